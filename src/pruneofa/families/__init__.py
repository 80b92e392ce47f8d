"""The supported model families as data, and functions that look them up.

A family is one file with one `Family` value, listed in FAMILIES. All code that depends on the family reads it from here
at call time. A family without a new operation therefore needs changes in this folder only. No torch, no transformers.
"""

import re

from pruneofa.families.bert import BERT
from pruneofa.families.distilbert import DISTILBERT
from pruneofa.families.family import POOLER, POOLER_WEIGHT, Family, RelativeBias, Shape, Task
from pruneofa.families.mpnet import MPNET
from pruneofa.families.roberta import ROBERTA

__all__ = ["FAMILIES", "POOLER", "POOLER_WEIGHT", "Family", "RelativeBias", "Shape", "Task"]

FAMILIES: tuple[Family, ...] = (BERT, DISTILBERT, ROBERTA, MPNET)

_WRAPPERS = ("module", "_orig_mod", "model")  # prefixes that DDP, torch.compile and others add to names
_OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def find(model_type: object) -> Family | None:
    """The family of config.json's `model_type`; None if it is not supported."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def of(model_type: str) -> Family:
    """The family of a `model_type` that is known to be supported."""
    family = find(model_type)
    assert family is not None, f"{model_type} is not supported, and was not checked"
    return family


def by_class(name: object) -> tuple[Family, Task] | None:
    """Family and task of a transformers class; None if it is not supported."""
    return classes().get(name) if isinstance(name, str) else None


def classes() -> dict[str, tuple[Family, Task]]:
    """{transformers class: its family and task}."""
    found: dict[str, tuple[Family, Task]] = {}
    for family in FAMILIES:
        found |= {name: (family, task) for task, name in family.classes.items()}
        if family.pretraining:
            found[family.pretraining] = (family, "masked-LM")
    return found


def model_types() -> tuple[str, ...]:
    """Every supported `model_type` of config.json."""
    return tuple(family.model_type for family in FAMILIES)


def prefixes() -> tuple[str, ...]:
    """Every `base_model_prefix`."""
    return tuple(dict.fromkeys(family.prefix for family in FAMILIES))


def titles() -> str:
    """The families for a message: "A, B or C"."""
    *first, last = (family.title for family in FAMILIES)
    return f"{', '.join(first)} or {last}" if first else last


def shapes() -> dict[str, tuple[Family, Shape]]:
    """{name: family and sizes} of the models that `bench --random` makes."""
    return {shape.name: (family, shape) for family in FAMILIES for shape in family.shapes}


def layer_name() -> str:
    """The possible names of an encoder layer, for a message: "encoder.layer.N or transformer.layer.N"."""
    return " or ".join(dict.fromkeys(f"{family.layers}.N" for family in FAMILIES))


def without_encoder() -> str:
    """The end of an error message about weights without an encoder layer."""
    return f"no weight named {layer_name()}; wanted a {titles()} model"


def tokenizer_files(name: str) -> tuple[str, ...]:
    """The files that `tokenizer.json` is made from, by tokenizer class or model type; vocab.txt if it is unknown."""
    # Longest model type first, because one model type may be the end of another.
    known = sorted(FAMILIES, key=lambda family: len(family.model_type), reverse=True)
    found = (family.tokenizer_files for family in known if family.model_type in name.lower())
    return next(found, ("vocab.txt",))


def by_tokenizer(name: object) -> Family | None:
    """The family whose own tokenizer class has this name, with or without Fast at its end."""
    own = {family.classes["embedding"].removesuffix("Model") + "Tokenizer": family for family in FAMILIES}
    return own.get(name.removesuffix("Fast")) if isinstance(name, str) else None


def base_name(name: str) -> str:
    """Parameter name without the prefix of the base model or of a wrapper."""
    before = {*_WRAPPERS, *prefixes()}
    while (parts := name.partition("."))[1] and parts[0] in before:
        name = parts[2]
    return name


def canonical_name(name: str) -> str:
    """`base_name`, with LayerNorm's gamma and beta of old checkpoints renamed to weight and bias."""
    name = base_name(name)
    for old, new in _OLD_NORM.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def is_encoder_weight(name: str, ndim: int) -> bool:
    """Whether a canonical name with this many dimensions is the weight of a Linear layer of the encoder."""
    return ndim == 2 and re.fullmatch(rf"(?:{_layers()})\.\d+\.(?!.*embedding).+\.weight", name) is not None


def layer_index(name: str) -> int | None:
    """Number of the encoder layer that a canonical name belongs to; None outside the layers."""
    found = re.match(rf"(?:{_layers()})\.(\d+)\.", name)
    return int(found[1]) if found else None


def encoder_part(name: str) -> str | None:
    """The canonical name of a parameter of an encoder layer or the pooler, after any prefix; None for others."""
    found = re.search(rf"(?:^|\.)((?:{_layers()})\.\d+\..+|{re.escape(POOLER_WEIGHT)})$", name)
    return found[1] if found else None


def attention_input(name: str) -> str | None:
    """A name for the input that the query, key and value of a layer share; None for any other weight.

    `name` is the canonical name of the weight.
    """
    for family in FAMILIES:
        for module in (family.layer.query, family.layer.key, family.layer.value):
            if name.startswith(f"{family.layers}.") and name.endswith(f".{module}.weight"):
                return f"{name.removesuffix(f'.{module}.weight')}.attention"
    return None


def embedding_weights() -> tuple[str, ...]:
    """Canonical names of the weights of embedding tables, word embeddings first."""
    return tuple(dict.fromkeys(f"{table}.weight" for family in FAMILIES for table in family.tables.values()))


def tied_to(name: str) -> str | None:
    """The embedding table that the weight of a masked-LM decoder may be tied to; None for any other weight."""
    tied = {f"{family.masked_lm.decoder}.weight": f"{family.tables['word']}.weight" for family in FAMILIES}
    return tied.get(name)


def base_modules() -> set[str]:
    """First parts of the names of a base model's tensors."""
    return set().union(*(family.base_modules() for family in FAMILIES))


def _layers() -> str:
    return "|".join(dict.fromkeys(re.escape(family.layers) for family in FAMILIES))
