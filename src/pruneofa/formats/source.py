"""The tensors of a Hugging Face folder that are packed, by canonical name, as float32."""

from pathlib import Path

import numpy as np

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT, canonical_name
from pruneofa.formats.manifest import SOURCE_DTYPES, kind_of
from pruneofa.formats.tensors import StoredTensor, read_tensor, tensors_of, weight_files

Source = dict[str, tuple[str, StoredTensor]]  # {canonical name: (name in the source, location)}

_BUFFERS = ("position_ids", "token_type_ids")  # integer buffers that transformers recreates


def source_tensors(folder: Path) -> Source:
    """{canonical name: (name in the source, location)} of every floating-point tensor.

    Raises InputError for a tensor of another dtype, an empty one, and two of one canonical name.
    """
    found: Source = {}
    for file in weight_files(folder):
        for original, stored in tensors_of(file):
            name = canonical_name(original)
            if stored.dtype not in SOURCE_DTYPES:
                if name.split(".")[-1] in _BUFFERS:
                    continue
                wanted = ", ".join(SOURCE_DTYPES)
                raise InputError(f"{file}: {original} has dtype {stored.dtype}; wanted {wanted}: convert the model")
            if 0 in stored.shape:
                raise InputError(
                    f"{file}: {original} has shape {list(stored.shape)}, which is empty; save the model again"
                )
            if name in found:
                raise InputError(f"{file}: {original} and {found[name][0]} are both {name}; keep only one of them")
            found[name] = original, stored
    return found


def source_prefix(folder: Path, found: Source) -> str:
    """The prefix of the names of the encoder's linears in the source: that of the base model.

    Raises InputError for a source without them.
    """
    for name, (original, stored) in sorted(found.items()):
        if name != POOLER_WEIGHT and kind_of(name, len(stored.shape)) == "linear":
            return original.removesuffix(name)
    raise InputError(f"{folder}: {families.without_encoder()}")


def check_finite(folder: Path) -> None:
    """Read every tensor of a folder back. Raises InputError, naming the tensor, for NaN and infinity."""
    for original, stored in source_tensors(folder).values():
        read_float(original, stored)


def read_float(original: str, stored: StoredTensor) -> np.ndarray:
    """A tensor as float32, which holds every float16 and bfloat16 exactly. Raises InputError for NaN and infinity."""
    weight = read_tensor(original, stored).astype(np.float32, copy=False)
    refuse_non_finite(f"{stored.file}: {original}", weight)
    return weight


def refuse_non_finite(name: str, weight: np.ndarray) -> None:
    """Raises InputError, beginning with `name`, if a value of `weight`, of any shape, is NaN or infinite."""
    if count := weight.size - int(np.count_nonzero(np.isfinite(weight))):
        raise InputError(f"{name} has {count} NaN or infinite values; wanted finite numbers: train again")
