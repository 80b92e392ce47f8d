"""The checked settings of config.json, and the tensors that a model with these settings must have.

Packing and the engine both use these checks, so they refuse the same models.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa import families
from pruneofa.errors import InputError, short
from pruneofa.families import Family, Task
from pruneofa.formats.sentence import cross_encoder_activation

_SAVE_AGAIN = (
    "copy the config.json that was saved with these weights, or save model and config again with model.save_pretrained"
)
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

_ROWS = {"word": "vocab_size", "position": "max_position_embeddings"}  # {embedding table: key of config.json}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """The checked settings of a model.

    Attributes:
        name: the transformers class, or the model type of a bare encoder; for error messages.
        pad_id: id of the padding token if positions are counted from it, otherwise None (positions from 0).
        types: number of token types; 0 if the model has none.
        rows: {embedding table, as in `tables`: number of its rows}; -1 if the config does not give it.
        labels: names of the classes by class id; empty if the config gives none.
        problem_type: for classification "regression", "single_label_classification", "multi_label_classification",
            or None, if it follows from the number of labels.
    """

    name: str
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
    rows: Mapping[str, int]
    labels: tuple[str, ...]
    problem_type: str | None

    @property
    def tables(self) -> dict[str, str]:
        """{"word" | "position" | "token_type": canonical name of the embedding table}."""
        return {name: f"{module}.weight" for name, module in self.family.tables.items()}

    @property
    def first_position(self) -> int:
        """Row of the position table for the first token of a sequence; the rows before it are not used."""
        return 0 if self.pad_id is None else self.family.first_position(self.pad_id)

    def positions(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Row of the position table of each token of one sequence, (tokens,)."""
        if self.pad_id is None:
            return np.arange(len(ids), dtype=np.int32)
        counted = ids != self.pad_id
        return (np.cumsum(counted) * counted + self.pad_id).astype(np.int32)

    def layer(self, index: int) -> dict[str, str]:
        """{field of `Layer`: canonical name of the module} of one layer."""
        return {field: f"{self.family.layers}.{index}.{name}" for field, name in self.family.layer.modules().items()}

    def linear_shape(self, field: str) -> tuple[int, int]:
        """(outputs, inputs) of the linear layer named by this field of `Layer`."""
        wide = {"intermediate": (self.inner, self.hidden), "output": (self.hidden, self.inner)}
        return wide.get(field, (self.hidden, self.hidden))


def read_architecture(config: Mapping[str, Any], where: Any) -> Architecture:
    """Check a config.json and return the settings that the engine needs; error messages begin with `where`.

    Raises:
        InputError: an unknown architecture or activation, relative positions of another kind than the family's, a
            decoder, or a size that is missing or not a positive integer.
    """
    family, task, name = _family_and_task(config, where)
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise InputError(
            f"{where}: config.json describes a decoder (is_decoder, add_cross_attention), wanted an encoder; "
            "run this model with transformers"
        )
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise InputError(f"{where}: position_embedding_type is {short(kind)} in config.json, wanted 'absolute'; "
                         "run this model with transformers")  # fmt: skip
    activation = config.get(family.keys.activation, "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{where}: activation {short(activation)} in config.json, wanted one of {', '.join(ACTIVATIONS)}; "
            "run this model with transformers"
        )
    hidden = _size(config, family.keys.hidden, where)
    heads = _size(config, family.keys.heads, where)
    if hidden % heads:
        raise InputError(
            f"{where}: hidden size {hidden} in config.json is not divisible by {heads} heads; correct the file"
        )
    epsilon = config.get("layer_norm_eps", 1e-12) if family.epsilon is None else family.epsilon
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise InputError(f"{where}: layer_norm_eps is {short(epsilon)} in config.json, wanted a number such as 1e-12; "
                         "correct the file")  # fmt: skip
    counted = family.positions_after_padding
    pad_id = family.pad_id
    if counted and pad_id is None:
        pad_id = _size(config, "pad_token_id", where, least=0, default=1)
    bias = family.relative_bias
    if bias is not None and config.get(bias.key, bias.buckets) != bias.buckets:
        raise InputError(
            f"{where}: {bias.key} is {short(config[bias.key])} in config.json, wanted {bias.buckets}; "
            "run this model with transformers"
        )
    types = _size(config, "type_vocab_size", where, default=2) if family.token_types else 0
    rows = {table: _size(config, key, where) if key in config else -1 for table, key in _ROWS.items()}
    return Architecture(
        name=name,
        family=family,
        task=task,
        hidden=hidden,
        layers=_size(config, family.keys.layers, where),
        heads=heads,
        inner=_size(config, family.keys.inner, where),
        epsilon=epsilon,
        activation=activation,
        pad_id=pad_id if counted else None,
        types=types,
        rows=rows | {"token_type": types},
        labels=_labels(config, where),
        problem_type=_cross_encoder(config, where, task) or _problem_type(config, where),
    )


def check_tensors(architecture: Architecture, shapes: Mapping[str, Shape], where: Any, *, head: bool = True) -> None:
    """Check that a model has every tensor that its architecture needs, and nothing else that would be computed.

    Args:
        architecture: the settings of its config.json.
        shapes: {canonical name: shape} of all its tensors.
        where: beginning of error messages.
        head: whether to check the task head as well as the encoder.

    Raises:
        InputError: a tensor is missing or of another shape, there are more layers than config.json says or tensors in
            them that no layer has, the classifier has another number of classes than config.json names, or there is
            one that config.json does not.
    """
    known = set()  # grows with the tensors that are there, not with the number of layers that config.json claims
    for name, shape in chain(_encoder(architecture), _head(architecture, shapes) if head else ()):
        if name not in shapes:
            raise _missing(name, shapes, architecture, where)
        if not _fits(shapes[name], shape):
            raise InputError(
                f"{where}: {name} has shape {_text(shapes[name])}, config.json wants {_text(shape)}; {_SAVE_AGAIN}"
            )
        known.add(name)
    rows, first = shapes[architecture.tables["position"]][0], architecture.first_position
    if rows <= first:
        raise InputError(
            f"{where}: config.json has pad_token_id {architecture.pad_id}, so positions begin at {first}, wanted less "
            f"than the {rows} rows of their table; correct pad_token_id"
        )
    check_layers(architecture.family, architecture.layers, shapes, where)
    check_additions(known, shapes, where)
    if head and architecture.task == "embedding":
        _refuse_trained_head(architecture.family, shapes, where)
    if head and architecture.task in ("classification", "token classification"):
        rows = shapes[_classifier(architecture)][0]
        if architecture.labels and len(architecture.labels) != rows:
            raise InputError(
                f"{where}: the classifier has {rows} classes, id2label in config.json has "
                f"{len(architecture.labels)}; {_SAVE_AGAIN}"
            )


def check_encoder(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: Any) -> None:
    """Check the encoder's tensors against config.json as `check_tensors` does, also where the engine cannot run it.

    A model type that is not supported is not checked.
    """
    family = families.find(config.get("model_type"))
    if family is None:
        return
    keys = family.keys
    wanted = ("model_type", *_ROWS.values(), "type_vocab_size", keys.hidden, keys.heads, keys.inner, keys.layers)
    if family.relative_bias is not None:
        wanted = (*wanted, family.relative_bias.key)
    sizes = {key: config[key] for key in wanted if key in config}
    check_tensors(read_architecture(sizes, where), shapes, where, head=False)


def check_layers(family: Family, layers: int, names: Iterable[str], where: Any) -> None:
    """Check that no tensor belongs to a layer beyond the number `layers` of config.json.

    Args:
        names: canonical names.

    Raises:
        InputError: naming the first such tensor.
    """
    beyond = sorted(name for name in names if (families.layer_index(name) or 0) >= layers)
    if beyond:
        raise InputError(
            f"{where}: got the tensor {beyond[0]}, config.json wants {layers} layers ({family.keys.layers}); "
            f"{_SAVE_AGAIN}"
        )


def check_additions(known: Container[str], names: Iterable[str], where: Any) -> None:
    """Check that encoder layers have no tensors, such as those of adapters, beyond the canonical names `known`.

    Raises InputError naming the first such tensor.
    """
    added = sorted(name for name in names if families.layer_index(name) is not None and name not in known)
    if added:
        raise InputError(
            f"{where}: {len(added)} tensors, such as {added[0]}, are in encoder layers but not computed by them, "
            "wanted the layers of the architecture alone; merge adapters into the weights, and save the model again"
        )


def _refuse_trained_head(family: Family, shapes: Mapping[str, Shape], where: Any) -> None:
    heads: dict[Task, str] = {
        "classification": family.classification.output,
        "token classification": family.token_classification,
        "question answering": family.question_answering,
    }
    found = [f"{module}.weight" for module in heads.values() if f"{module}.weight" in shapes]
    if found:
        wanted = " or ".join(family.classes[task] for task in heads)
        raise InputError(
            f"{where}: got {found[0]}, a trained head that config.json does not name, wanted its class ({wanted}) in "
            "architectures; add it to config.json, or remove the head from the weights"
        )


def _encoder(architecture: Architecture) -> Iterator[tuple[str, Shape]]:
    """(canonical name, shape) of every tensor of the encoder; -1 means any size."""
    hidden = architecture.hidden
    for index in range(architecture.layers):
        for field, name in architecture.layer(index).items():
            shape = (hidden,) if field.endswith("_norm") else architecture.linear_shape(field)
            yield f"{name}.weight", shape
            yield f"{name}.bias", shape[:1]
    for table, name in architecture.tables.items():
        yield name, (architecture.rows[table], hidden)
    if bias := architecture.family.relative_bias:
        yield f"{bias.table}.weight", (bias.buckets, architecture.heads)
    yield from _linear(architecture.family.embedding_norm, (hidden,))


def _head(architecture: Architecture, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """(canonical name, shape) of every tensor of the task head; -1 means any size."""
    family, hidden = architecture.family, architecture.hidden
    match architecture.task:
        case "classification":
            yield from _linear(family.classification.dense, (hidden, hidden))
            yield from _classes(_classifier(architecture), hidden, shapes)
        case "token classification":
            yield from _classes(_classifier(architecture), hidden, shapes)
        case "question answering":
            yield from _linear(family.question_answering, (2, hidden))
        case "masked-LM":
            head, rows = family.masked_lm, _rows(shapes, architecture.tables["word"])
            yield from _linear(head.dense, (hidden, hidden))
            yield from _linear(head.norm, (hidden,))
            if f"{head.decoder}.weight" in shapes:  # otherwise tied to the word embeddings
                yield f"{head.decoder}.weight", (rows, hidden)
            yield family.masked_lm.bias(shapes), (rows,)


def _linear(module: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{module}.weight", shape
    yield f"{module}.bias", shape[:1]


def _classes(weight: str, hidden: int, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    yield weight, (-1, hidden)
    yield weight.removesuffix("weight") + "bias", (_rows(shapes, weight),)


def _classifier(architecture: Architecture) -> str:
    family = architecture.family
    classification = architecture.task == "classification"
    return f"{family.classification.output if classification else family.token_classification}.weight"


def _rows(shapes: Mapping[str, Shape], name: str) -> int:
    return shapes[name][0] if shapes.get(name) else -1


def _missing(name: str, shapes: Mapping[str, Shape], architecture: Architecture, where: Any) -> InputError:
    stem, _, last = name.rpartition(".")
    if (old := f"{stem}.module.{last}") in shapes:
        return InputError(
            f"{where}: got the tensor {old}, a name of torch's quantization-aware training, wanted "
            f"{name}; convert the model to one without quantization modules, or remove '.module' from the names"
        )
    return InputError(
        f"{where}: no tensor {name}, which {architecture.name} has; "
        "the weights belong to another model, or were not fine-tuned for this task"
    )


def _fits(got: Shape, wanted: Shape) -> bool:
    return len(got) == len(wanted) and all(size in (-1, have) for size, have in zip(wanted, got, strict=True))


def _text(shape: Shape) -> str:
    return "x".join("N" if size == -1 else str(size) for size in shape)


def _family_and_task(config: Mapping[str, Any], where: Any) -> tuple[Family, Task, str]:
    architectures = config.get("architectures")
    if not architectures:  # a bare encoder, if the model type is known
        family = families.find(config.get("model_type"))
        if family is None:
            raise InputError(
                f"{where}: config.json has no architectures and model_type {short(config.get('model_type'))}, "
                f"wanted one of {', '.join(families.model_types())}; run this model with transformers"
            )
        return family, "embedding", f"a {family.model_type} encoder"
    name = architectures[0] if isinstance(architectures, list) else architectures
    found = families.by_class(name)
    if found is None:
        own = families.find(config.get("model_type"))
        wanted = [title for title, (family, _) in families.classes().items() if own in (None, family)]
        raise InputError(
            f"{where}: architecture {short(name)} in config.json, wanted one of {', '.join(wanted)}; "
            "save the model with one of these heads, or run it with transformers"
        )
    family, task = found
    stated = config.get("model_type")  # by which transformers chooses the encoder
    if stated is not None and stated != family.model_type:
        raise InputError(
            f"{where}: config.json has model_type {short(stated)} but architecture {name}, which is of "
            f"{family.model_type}, wanted both of one family; copy the config.json that was saved with these weights"
        )
    return family, task, name


def _size(config: Mapping[str, Any], key: str, where: Any, *, least: int = 1, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise InputError(
            f"{where}: {key} is {short(value)} in config.json, wanted an integer of at least {least}; correct the file"
        )
    return value


def _labels(config: Mapping[str, Any], where: Any) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    try:
        by_id = {int(index): str(name) for index, name in names.items()}
        found = tuple(by_id[index] for index in range(len(by_id)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{where}: id2label in config.json is {short(names)}, wanted an object from class ids 0, 1, ... to names; "
            "correct the file"
        ) from None
    if len(set(found)) < len(found):
        twice, count = Counter(found).most_common(1)[0]
        raise InputError(
            f"{where}: id2label in config.json gives the name {short(twice)} to {count} classes, wanted "
            "another for each; correct the file"
        )
    return found


def _problem_type(config: Mapping[str, Any], where: Any) -> str | None:
    known = ("regression", "single_label_classification", "multi_label_classification")
    value = config.get("problem_type")
    if value is not None and value not in known:
        raise InputError(
            f"{where}: problem_type is {short(value)} in config.json, wanted one of {', '.join(known)}; "
            "correct the file"
        )
    return value


def _cross_encoder(config: Mapping[str, Any], where: Any, task: Task) -> str | None:
    """The problem type that gives the scores of a cross-encoder's activation; None if config.json has none."""
    activation = cross_encoder_activation(config, where) if task == "classification" else None
    return {"Identity": "regression", "Sigmoid": "multi_label_classification", None: None}[activation]
