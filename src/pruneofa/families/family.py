"""The dataclasses that describe a model family. Each family's values are in its own file in this folder."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from typing import Literal

Task = Literal["embedding", "classification", "question answering", "token classification", "masked-LM"]

POOLER = "pooler.dense"  # name of the pooler in packed folders and in pattern hashes
POOLER_WEIGHT = f"{POOLER}.weight"


@dataclass(frozen=True)
class Layer:
    """Module names inside one transformer layer, in the order of computation."""

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
        dense: module name; POOLER if the family's classifier uses the pooler.
    """

    dense: str
    activation: Literal["tanh", "relu"]
    output: str


@dataclass(frozen=True)
class MaskedLMHead:
    """Masked language modeling: `decoder(norm(activation(dense(x))))`, the decoder tied to the word embeddings.

    Attributes:
        activation: name of the activation; None: the encoder's activation in config.json.
        biases: possible tensor names of the decoder's bias; a file has one or more of them.
    """

    dense: str
    norm: str
    decoder: str
    biases: tuple[str, ...]
    activation: str | None = None

    def bias(self, names: Container[str]) -> str:
        """The first possible name of the decoder's bias that is in `names`, or the first of all if none is."""
        return next((name for name in self.biases if name in names), self.biases[0])


@dataclass(frozen=True)
class RelativeBias:
    """A number that every layer adds to the score of a query and a key, by head and by their distance.

    One half of the buckets is for keys before the query and its own, the other for those after it. In each half, every
    distance below half of its buckets has one of its own; greater ones share the rest, whose limits grow geometrically
    up to `max_distance`; the last bucket has all beyond.

    Attributes:
        table: embedding module whose weight is (buckets, heads).
        key: key of config.json for the number of buckets.
        buckets: the number that transformers' code uses; another one in config.json is refused.
        max_distance: distance in tokens, as above.
    """

    table: str
    key: str
    buckets: int
    max_distance: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a well-known model, for benchmarks with random weights.

    Attributes:
        name: name on the command line.
        title: name in tables.
    """

    name: str
    title: str
    layers: int
    hidden: int
    heads: int
    inner: int


@dataclass(frozen=True)
class Family:
    """Description of a model family. Tensor and module names have no base-model prefix.

    Attributes:
        title: name in messages.
        model_type: `model_type` of config.json.
        prefix: transformers' `base_model_prefix`, with which the names of the base model's tensors begin.
        classes: {task: transformers class}.
        pretraining: class with masked-LM and next-sentence heads, which runs as masked-LM; None where there is none.
        keys: names of the sizes in config.json.
        epsilon: LayerNorm's epsilon if transformers' code fixes it; None: `layer_norm_eps` of config.json.
        token_types: whether the model has token type embeddings; their number is `type_vocab_size` of config.json.
        positions_after_padding: whether positions start at `pad_token_id` + 1 and padding has position
            `pad_token_id`; otherwise they start at 0.
        tables: {"word" | "position" | "token_type": embedding module}, in the order of the model.
        embedding_norm: module of the LayerNorm over the sum of embeddings.
        layers: module list of the layers; every two-dimensional weight in it except embeddings is prunable.
        layer: module names inside one layer.
        pooler: whether the base model has the linear layer POOLER, which is pruned and counted separately.
        classification: head of sequence classification.
        question_answering: linear module of question answering: start and end logits.
        token_classification: linear module of token classification.
        masked_lm: head of masked language modeling.
        next_sentence: linear module of next-sentence prediction; None where there is none.
        tokenizer_files: the files that `tokenizer.json` can be made from.
        tokenizer_types: whether transformers' tokenizer of the family gives token types if nothing says so.
        shapes: well-known sizes.
        pad_id: id of the padding token, from which positions are counted, if transformers' code fixes it; None:
            `pad_token_id` of config.json.
        relative_bias: the bias of attention by relative position; None where there is none.
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
    tokenizer_types: bool = False
    pad_id: int | None = None
    relative_bias: RelativeBias | None = None

    def first_position(self, pad_id: int) -> int:
        """Row of the position table of a sequence's first token; `pad_id` is config.json's `pad_token_id`."""
        known = pad_id if self.pad_id is None else self.pad_id
        return known + 1 if self.positions_after_padding else 0

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
