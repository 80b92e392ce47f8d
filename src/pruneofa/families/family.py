"""The type of what the package knows of a model family. The values stand in one file per family beside this one."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

Task = Literal["embedding", "classification", "question answering", "token classification", "masked-LM"]

POOLER = "pooler.dense"  # the one name a pooler has in the packed format and in pattern hashes


@dataclass(frozen=True)
class Layer:
    """Module names inside one transformer layer, in the order in which they are read."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str

    def modules(self) -> dict[str, str]:
        """{field: module name}, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class ConfigKeys:
    """Keys of config.json."""

    hidden: str
    layers: str
    heads: str
    inner: str
    activation: str


@dataclass(frozen=True)
class ClassificationHead:
    """Sequence classification of the first token: `output(activation(dense(x)))`.

    Attributes:
        dense: module name; of a family that classifies by its pooler, POOLER.
    """

    dense: str
    activation: Literal["tanh", "relu"]
    output: str


@dataclass(frozen=True)
class MaskedLMHead:
    """Masked language modeling: `decoder(norm(activation(dense(x))))`, the decoder tied to the word embeddings.

    Attributes:
        activation: name of the activation; None: the one that config.json gives for the encoder.
        biases: tensor names that the decoder's bias may have; files hold one of them or all.
    """

    dense: str
    norm: str
    decoder: str
    biases: tuple[str, ...]
    activation: str | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes of a well-known model, for benchmarks with random weights.

    Attributes:
        name: on the command line.
        title: in tables.
    """

    name: str
    title: str
    layers: int
    hidden: int
    heads: int
    inner: int


@dataclass(frozen=True)
class Family:
    """What the package knows of a model family. Tensor and module names are without the base model's prefix.

    Attributes:
        title: the name in messages.
        model_type: of config.json.
        prefix: transformers' `base_model_prefix`, which stands before the names of the base model's tensors.
        classes: {task: transformers class}.
        pretraining: class with masked-LM and next-sentence heads, which runs as masked-LM; None where there is none.
        keys: names of the sizes in config.json.
        epsilon: of LayerNorm, where transformers has it in code; None: `layer_norm_eps` of config.json.
        token_types: whether the model has token type embeddings; their number is `type_vocab_size` of config.json.
        positions_after_padding: whether positions are counted from `pad_token_id` + 1, padding staying at
            `pad_token_id`; otherwise from 0.
        tables: {"word" | "position" | "token_type": embedding module}, in the order of the model.
        embedding_norm: module of the LayerNorm over the sum of embeddings.
        layers: module list of the layers; every two-dimensional weight in it, embeddings apart, is prunable.
        layer: modules in one of them.
        pooler: whether the base model has the linear layer POOLER, which is pruned and counted apart.
        classification: head of sequence classification.
        question_answering: linear module of question answering: start and end logits.
        token_classification: linear module of token classification.
        masked_lm: head of masked language modeling.
        next_sentence: linear module of next-sentence prediction; None where there is none.
        tokenizer_files: what `tokenizer.json` can be made from.
        shapes: well-known sizes.
    """

    title: str
    model_type: str
    prefix: str
    classes: Mapping[Task, str]
    pretraining: str | None
    keys: ConfigKeys
    epsilon: float | None
    token_types: bool
    positions_after_padding: bool
    tables: Mapping[str, str]
    embedding_norm: str
    layers: str
    layer: Layer
    pooler: bool
    classification: ClassificationHead
    question_answering: str
    token_classification: str
    masked_lm: MaskedLMHead
    next_sentence: str | None
    tokenizer_files: tuple[str, ...]
    shapes: tuple[Shape, ...] = ()

    def first_position(self, pad_id: int) -> int:
        """Row of the position table of a sequence's first token; `pad_id` is config.json's `pad_token_id`."""
        return pad_id + 1 if self.positions_after_padding else 0

    def base_modules(self) -> set[str]:
        """First parts of the names of the base model's tensors, such as "embeddings"."""
        names = [*self.tables.values(), self.embedding_norm, self.layers, *([POOLER] if self.pooler else [])]
        return {name.partition(".")[0] for name in names}

    def head_modules(self) -> set[str]:
        """First parts of the names of tensors that a folder may lack because a new head is trained: heads, pooler."""
        head = self.masked_lm
        names = [
            self.classification.dense, self.classification.output, self.question_answering, self.token_classification,
            head.dense, head.norm, head.decoder, *head.biases, *([self.next_sentence] if self.next_sentence else []),
            POOLER,
        ]  # fmt: skip
        return {name.partition(".")[0] for name in names}
