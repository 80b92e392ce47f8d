"""What a config.json says about an encoder, checked, and which tensors of a BERT, DistilBERT or RoBERTa make it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pruneofa.errors import InputError, short
from pruneofa.formats.packed import Packed, PackedEmbedding
from pruneofa.formats.sentence import cross_encoder_activation

Family = Literal["bert", "distilbert", "roberta"]
Task = Literal["embedding", "classification", "question answering", "token classification", "masked-LM"]
Precision = Literal["int8", "fp32"]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_FAMILIES: dict[str, Family] = {"Bert": "bert", "DistilBert": "distilbert", "Roberta": "roberta"}
_TASKS: dict[str, Task] = {
    "Model": "embedding",
    "ForSequenceClassification": "classification",
    "ForQuestionAnswering": "question answering",
    "ForTokenClassification": "token classification",
    "ForMaskedLM": "masked-LM",
}
_ARCHITECTURES: dict[str, tuple[Family, Task]] = {
    **{first + last: (family, task) for first, family in _FAMILIES.items() for last, task in _TASKS.items()},
    "BertForPreTraining": ("bert", "masked-LM"),
}

# The engine's names and those of the tensors, both below one layer.
BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
DISTILBERT_LAYER = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "intermediate": "ffn.lin1",
    "output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}


@dataclass(frozen=True)
class Architecture:
    """The checked settings of a model.

    Attributes:
        pad_id: RoBERTa counts positions from pad_id + 1 and leaves padding at pad_id; None: positions from 0.
        types: number of token types; 0 without them (DistilBERT).
        labels: names of the classes in order, empty where the config gives none.
        problem_type: of classification: "regression", "single_label_classification",
            "multi_label_classification" or None, which the number of labels decides.
    """

    family: Family
    task: Task
    hidden: int
    layers: int
    heads: int
    inner: int
    epsilon: float
    activation: str
    pad_id: int | None
    types: int
    labels: tuple[str, ...]
    problem_type: str | None

    def positions(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Row of the position table of each token of one sequence, (tokens,)."""
        if self.pad_id is None:
            return np.arange(len(ids), dtype=np.int32)
        counted = ids != self.pad_id
        return (np.cumsum(counted) * counted + self.pad_id).astype(np.int32)


def read_architecture(config: Mapping[str, Any], where: Any) -> Architecture:
    """Check a config.json and take from it what the engine needs; errors begin with `where`.

    Raises:
        InputError: an unknown architecture or activation, relative positions, a decoder, or a size that is
            missing or no positive integer.
    """
    family, task = _family_and_task(config, where)
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise InputError(
            f"{where}: config.json describes a decoder (is_decoder, add_cross_attention), wanted an encoder; "
            "run this model with transformers"
        )
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise InputError(f"{where}: position_embedding_type is {short(kind)} in config.json, wanted 'absolute'; "
                         "models with relative positions run in transformers only")  # fmt: skip
    distil = family == "distilbert"
    activation = config.get("activation" if distil else "hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{where}: activation {short(activation)} in config.json, wanted one of {', '.join(ACTIVATIONS)}; "
            "run this model with transformers"
        )
    hidden = _size(config, "dim" if distil else "hidden_size", where)
    heads = _size(config, "n_heads" if distil else "num_attention_heads", where)
    if hidden % heads:
        raise InputError(
            f"{where}: hidden size {hidden} in config.json is not divisible by {heads} heads; mend the file"
        )
    epsilon = 1e-12 if distil else config.get("layer_norm_eps", 1e-12)  # DistilBERT's is written into its code
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise InputError(f"{where}: layer_norm_eps is {short(epsilon)} in config.json, wanted a number such as 1e-12")
    return Architecture(
        family=family,
        task=task,
        hidden=hidden,
        layers=_size(config, "n_layers" if distil else "num_hidden_layers", where),
        heads=heads,
        inner=_size(config, "hidden_dim" if distil else "intermediate_size", where),
        epsilon=epsilon,
        activation=activation,
        pad_id=_size(config, "pad_token_id", where, least=0, default=1) if family == "roberta" else None,
        types=0 if distil else _size(config, "type_vocab_size", where, default=2),
        labels=_labels(config, where),
        problem_type=_cross_encoder(config, where, task) or _problem_type(config, where),
    )


def _family_and_task(config: Mapping[str, Any], where: Any) -> tuple[Family, Task]:
    architectures = config.get("architectures")
    if not architectures:  # a bare encoder, if the model type is known
        for family in _FAMILIES.values():
            if family == config.get("model_type"):
                return family, "embedding"
        raise InputError(
            f"{where}: config.json has no architectures and model_type {short(config.get('model_type'))}, "
            f"wanted one of {', '.join(_FAMILIES.values())}"
        )
    name = architectures[0] if isinstance(architectures, list) else architectures
    if name not in _ARCHITECTURES:
        raise InputError(
            f"{where}: architecture {short(name)} in config.json, wanted one of {', '.join(_ARCHITECTURES)}; "
            "save the model with one of these heads, or run it with transformers"
        )
    return _ARCHITECTURES[name]


def _size(config: Mapping[str, Any], key: str, where: Any, *, least: int = 1, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise InputError(f"{where}: {key} is {short(value)} in config.json, wanted an integer of at least {least}")
    return value


def _labels(config: Mapping[str, Any], where: Any) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    try:
        by_id = {int(index): str(name) for index, name in names.items()}
        return tuple(by_id[index] for index in range(len(by_id)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{where}: id2label in config.json is no table of 0, 1, ... to names; mend the file") from None


def _problem_type(config: Mapping[str, Any], where: Any) -> str | None:
    known = ("regression", "single_label_classification", "multi_label_classification")
    value = config.get("problem_type")
    if value is not None and value not in known:
        raise InputError(f"{where}: problem_type is {short(value)} in config.json, wanted one of {', '.join(known)}")
    return value


def _cross_encoder(config: Mapping[str, Any], where: Any, task: Task) -> str | None:
    """The problem type whose scores are those of a cross-encoder's activation; None where config.json names none."""
    activation = cross_encoder_activation(config, where) if task == "classification" else None
    return {"Identity": "regression", "Sigmoid": "multi_label_classification", None: None}[activation]


class Weights:
    """The tensors of a packed model by name, in the precision asked for, with errors that name what is wrong.

    A linear layer is taken out of the packed model as it is laid out: both at once would be twice the memory.
    """

    def __init__(self, packed: Packed, native: Any, isa: str) -> None:
        self._packed, self._native, self._isa = packed, native, isa
        self._static = packed.input_scales or {}

    def plain(self, name: str, *shape: int) -> NDArray[np.float32]:
        """The float32 tensor `name`; -1 in `shape` stands for any size.

        Raises:
            InputError: there is none, or it has another shape.
        """
        found = self._packed.plain.get(name)
        if found is None:
            raise self._missing(name)
        if not _fits(found, shape):
            raise self._wrong_shape(name, found.shape, shape)
        return np.ascontiguousarray(found, np.float32)

    def has(self, name: str) -> bool:
        """Whether there is a plain tensor of this name."""
        return name in self._packed.plain

    def linear(self, name: str, rows: int, columns: int) -> Any:
        """`native.Linear` of NAME.weight and NAME.bias; it can be asked for once.

        Raises:
            InputError: there is no such weight or bias, it has another shape, or it is too large for the kernels.
        """
        weight = self._packed.linears.pop(f"{name}.weight", None)
        if weight is None:
            raise self._missing(f"{name}.weight")
        if tuple(weight.shape) != (rows, columns):
            raise self._wrong_shape(f"{name}.weight", weight.shape, (rows, columns))
        bias = self.plain(f"{name}.bias", rows)
        static = self._static.get(f"{name}.weight")
        try:
            arguments = (weight.bitmask, weight.values, weight.scale, bias, columns, self._isa)
            return self._native.Linear(*arguments) if static is None else self._native.Linear(*arguments, static)
        except ValueError as error:  # the kernels take fewer inputs than the format has columns
            raise InputError(f"{self._packed.folder}: {name}.weight: {error}; use a narrower model") from None

    def norm(self, name: str, hidden: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Gamma and beta of a LayerNorm."""
        return self.plain(f"{name}.weight", hidden), self.plain(f"{name}.bias", hidden)

    def table(self, name: str, rows: int, hidden: int) -> PackedEmbedding:
        """The embedding table embeddings.NAME_embeddings.weight; -1 rows stand for any number."""
        full = f"embeddings.{name}_embeddings.weight"
        found = self._packed.embeddings.get(full)
        if found is None:
            raise self._missing(full)
        if not _fits(found.values, (rows, hidden)):
            raise self._wrong_shape(full, found.values.shape, (rows, hidden))
        return found

    def _missing(self, name: str) -> InputError:
        stem, _, last = name.rpartition(".")
        if (old := f"{stem}.module.{last}") in self._packed.linears.keys() | self._packed.plain.keys():
            return InputError(
                f"{self._packed.folder}: got the tensor {old}, a name of torch's quantization-aware training, wanted "
                f"{name}; convert the model to a plain one, or take '.module' out of the names"
            )
        return InputError(
            f"{self._packed.folder}: no tensor {name}, which {_architecture_name(self._packed.config)} has; "
            "the weights belong to another model, or were not fine-tuned for this task"
        )

    def _wrong_shape(self, name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> InputError:
        sizes = ["x".join("N" if size == -1 else str(size) for size in shape) for shape in (got, wanted)]
        return InputError(
            f"{self._packed.folder}: {name} has shape {sizes[0]}, config.json wants {sizes[1]}; "
            "weights and config belong to different models"
        )


def _fits(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    return array.ndim == len(shape) and all(size in (-1, got) for size, got in zip(shape, array.shape, strict=True))


def _architecture_name(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or [f"a {config.get('model_type')} encoder"])[0]


def build_encoder(native: Any, weights: Weights, architecture: Architecture, *, threads: int, isa: str) -> Any:
    """`native.Encoder` of a packed model.

    Raises:
        InputError: a tensor is missing or does not fit the config.
    """
    hidden = architecture.hidden
    distil = architecture.family == "distilbert"
    prefix, names = ("transformer", DISTILBERT_LAYER) if distil else ("encoder", BERT_LAYER)
    shapes = {"intermediate": (architecture.inner, hidden), "output": (hidden, architecture.inner)}
    layers = []
    for index in range(architecture.layers):
        layer: dict[str, Any] = {}
        for ours, theirs in names.items():
            name = f"{prefix}.layer.{index}.{theirs}"
            if ours.endswith("_norm"):
                layer[ours] = weights.norm(name, hidden)
            else:
                layer[ours] = weights.linear(name, *shapes.get(ours, (hidden, hidden)))
        layers.append(layer)
    rows = {"word": -1, "position": -1} | ({} if distil else {"token_type": architecture.types})
    tables = {name: weights.table(name, count, hidden) for name, count in rows.items()}
    native_tables = {name: (table.values, table.scale) for name, table in tables.items()}
    return native.Encoder(
        hidden=hidden,
        heads=architecture.heads,
        epsilon=architecture.epsilon,
        activation=architecture.activation,
        threads=threads,
        isa=isa,
        word=native_tables["word"],
        position=native_tables["position"],
        token_type=native_tables.get("token_type"),
        embedding_norm=weights.norm("embeddings.LayerNorm", hidden),
        layers=layers,
    )
