"""The layout of a tensor file, computed from the manifest: offsets, bytes and bits.

Name, dtype and shape of every stored tensor follow from the manifest (`layout`). A reader therefore knows the size of
the tensor file before it opens it, and does not allocate memory for data that the file does not contain.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats.manifest import AGAIN, MANIFEST, Tensor
from pruneofa.formats.pattern import position_bits

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}  # in the order of a file: larger types first


class Slot(NamedTuple):
    """A tensor of the file: safetensors dtype name, shape, and whether it is part of the encoder's weights."""

    dtype: str
    shape: tuple[int, ...]
    encoder: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, as a Python int that cannot overflow."""
        return _BYTES[self.dtype] * math.prod(self.shape)


def layout(tensors: Mapping[str, Tensor], precision: str, where: str = MANIFEST) -> dict[str, Slot]:
    """Every tensor of the file in file order: by dtype (float32, int8, bits), then encoder weights first, then by name.

    Tensors of one kind are adjacent, which helps a compressor. Raises InputError, which begins with `where`, when two
    tensors would have the same name.
    """
    slots: dict[str, Slot] = {}
    for name, tensor in tensors.items():
        for stored, slot in _slots(name, tensor, precision):
            if stored in slots:
                raise InputError(f"{where}: two tensors would both be stored as {stored}; {AGAIN}")
            slots[stored] = slot
    return in_order(slots)


def in_order(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Sort by dtype, then encoder weights first, then by name; every offset is a multiple of the dtype's size."""
    ranks = list(_BYTES)
    return dict(sorted(slots.items(), key=lambda item: (ranks.index(item[1].dtype), not item[1].encoder, item[0])))


def _slots(name: str, tensor: Tensor, precision: str) -> Iterator[tuple[str, Slot]]:
    kind, shape, int8 = tensor.kind, tuple(tensor.shape), precision == "int8"
    encoder = kind == "linear" and name != POOLER_WEIGHT
    if kind == "linear":
        assert tensor.nonzeros is not None
        bits = Slot("U8", (shape[0], math.ceil(shape[1] / 8)), encoder)
        yield f"{name}.bitmask", bits
        yield f"{name}.values", Slot("I8" if int8 else "F32", (tensor.nonzeros,), encoder)
        if tensor.negative_zeros is not None:
            yield f"{name}.negative_zeros", bits
    elif kind == "embedding" and int8:
        yield f"{name}.values", Slot("I8", shape)
    elif kind != "tied":
        yield name, Slot("F32", shape)
    if int8 and kind in ("linear", "embedding"):
        yield f"{name}.scale", Slot("F32", shape[:1], encoder)


def header(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file: length of the header, and the header padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, slot in slots.items():
        start, end = end, end + slot.nbytes
        entries[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def figures(tensors: Mapping[str, Tensor], precision: str) -> dict[str, float]:
    """Figures of the encoder's weights: "sparsity", "encoder" (bytes), "bits_per_weight", "entropy_bound".

    The bound, in bits per weight, is 8 or 32 bits per non-zero plus the entropy of their positions.
    """
    linears = [tensor for name, tensor in tensors.items() if tensor.kind == "linear" and name != POOLER_WEIGHT]
    weights = sum(tensor.size for tensor in linears)
    nonzeros = sum(tensor.nonzeros or 0 for tensor in linears)
    stored = sum(slot.nbytes for slot in layout(tensors, precision).values() if slot.encoder)
    bound = (8 if precision == "int8" else 32) * nonzeros
    for tensor in linears:
        bound += position_bits(tensor.size, tensor.sparsity)
    return {
        "sparsity": 1 - nonzeros / weights,
        "encoder": stored,
        "bits_per_weight": 8 * stored / weights,
        "entropy_bound": bound / weights,
    }
