"""Sparsity patterns of stored models, with NumPy: block and n:m patterns, hashes and counts. No torch.

The pattern of a stored model is where the linear weights of its encoder are not zero. Tensors are read one at
a time, so that memory is bounded by the largest layer.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT, base_name, canonical_name, is_encoder_weight
from pruneofa.formats.architecture import check_encoder
from pruneofa.formats.files import is_there, read_json
from pruneofa.formats.tensors import StoredTensor, read_tensor, tensors_of, weight_files, weights_folder

BLOCKS = {"unstructured": (1, 1), "4x1": (4, 1), "1x4": (1, 4)}  # (output rows, input columns) of a block
_RATIO = re.compile(r"([1-9]\d?):([1-9]\d?)", re.ASCII)


def read_weights(
    path: str | Path, wanted: Callable[[str, int], bool] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (canonical name, array) of a Hugging Face folder or hub id, sorted by name, one tensor at a time.

    bfloat16 becomes float32, everything else keeps its dtype. `wanted(canonical name, ndim)` selects.
    Raises InputError when there is no such folder or no complete weights in it, and as `weights_folder` does.
    """
    for name, stored in sorted(stored_tensors(weights_folder(path)).items()):
        if wanted is None or wanted(name, len(stored.shape)):
            yield name, read_tensor(name, stored)


def inspect(path: str | Path) -> dict[str, Any]:
    """Sparsity, sizes and hashes of the folder or hub id.

    Returns "encoder" (sparsity), "pooler" (sparsity or None), "layers" {name: {"shape", "sparsity",
    "nonzeros"}} with the pooler last, "weights" and "nonzeros" of the encoder's linears, "pattern_hash",
    "pooler_hash" (or None), "sizes" in bytes of the encoder's linears and "bits_per_weight" with the same
    keys: dense_fp32, nonzeros_bitmask_fp32, nonzeros_bitmask_int8 (non-zeros and one bit per weight) and
    entropy_bound_int8 (8 bits per non-zero plus the entropy of their positions, layer by layer).
    Raises InputError as `read_weights` does, and for a model without encoder linears.
    """
    found: dict[str, dict[str, Any]] = {}

    def counted() -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
        for name, weight in read_weights(path, is_prunable):
            kept = weight != 0
            nonzeros = int(np.count_nonzero(kept))
            found[name] = {"shape": list(kept.shape), "sparsity": 1 - nonzeros / kept.size, "nonzeros": nonzeros}
            yield name, kept.shape, packed_bits(kept)

    check_config(path)
    encoder_hash, pooler_hash = pattern_hashes(counted())
    layers = {name: layer for name, layer in found.items() if name != POOLER_WEIGHT}
    if not layers:
        raise InputError(no_encoder(path))
    weights = sum(math.prod(layer["shape"]) for layer in layers.values())
    nonzeros = sum(layer["nonzeros"] for layer in layers.values())
    positions = sum(position_bits(math.prod(layer["shape"]), layer["sparsity"]) for layer in layers.values())
    sizes = {
        "dense_fp32": 4 * weights,
        "nonzeros_bitmask_fp32": 4 * nonzeros + math.ceil(weights / 8),
        "nonzeros_bitmask_int8": nonzeros + math.ceil(weights / 8),
        "entropy_bound_int8": nonzeros + math.ceil(positions / 8),
    }
    return {
        "encoder": 1 - nonzeros / weights,
        "pooler": found[POOLER_WEIGHT]["sparsity"] if POOLER_WEIGHT in found else None,
        "weights": weights,
        "nonzeros": nonzeros,
        "pattern_hash": encoder_hash,
        "pooler_hash": pooler_hash,
        "sizes": sizes,
        "bits_per_weight": {key: 8 * size / weights for key, size in sizes.items()},
        "layers": layers | {name: layer for name, layer in found.items() if name == POOLER_WEIGHT},
    }


def check_config(path: str | Path) -> None:
    """Check that the encoder's tensors are those that config.json, if there is one, gives.

    Raises InputError naming the first that is missing, of another shape or beyond the last layer, and as
    `read_weights` does.
    """
    folder = weights_folder(path)
    if not is_there(folder / "config.json"):
        return
    stored = {canonical_name(name): tensor.shape for name, tensor in stored_tensors(folder).items()}
    check_encoder(read_json(folder / "config.json"), stored, path)


def pattern_hash(kept: Mapping[str, np.ndarray]) -> str:
    """Hex sha256 of a pattern, {canonical name: bool array, True = kept}, independent of the order of keys.

    The hash runs over the layers sorted by name; each adds its name, a zero byte, the shape such as
    768x3072, a zero byte, and the bits in C order, packed little-endian and padded to a byte per layer.
    """
    digest = hashlib.sha256()
    for name in sorted(kept):
        _add_layer(digest, name, kept[name].shape, packed_bits(kept[name]))
    return digest.hexdigest()


def pattern_hashes(layers: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> tuple[str, str | None]:
    """`pattern_hash` of the encoder, and of the pooler or None.

    `layers` yields, sorted by canonical name, (name, shape, `packed_bits` as uint8 of any shape).
    """
    encoder, pooler = hashlib.sha256(), None
    for name, shape, bits in layers:
        if name == POOLER_WEIGHT:
            pooler = hashlib.sha256()
            _add_layer(pooler, name, shape, bits)
        else:
            _add_layer(encoder, name, shape, bits)
    return encoder.hexdigest(), pooler.hexdigest() if pooler else None


def packed_bits(kept: np.ndarray) -> np.ndarray:
    """A bool array in C order as uint8, eight values per byte, the first in the lowest bit."""
    return np.packbits(kept, bitorder="little")


def _add_layer(digest: Any, name: str, shape: tuple[int, ...], bits: np.ndarray) -> None:
    digest.update(f"{name}\0{'x'.join(map(str, shape))}\0".encode())
    digest.update(np.ascontiguousarray(bits).reshape(-1).data)


def pattern_holds(kept: np.ndarray, pattern: str) -> bool:
    """Whether the zeros of `kept`, bool (rows, columns), follow this pattern exactly."""
    rows, columns = kept.shape
    if pattern == "unstructured":
        return True
    if pattern in BLOCKS:
        height, width = BLOCKS[pattern]
        if rows % height or columns % width:
            return False
        blocks = kept.reshape(rows // height, height, columns // width, width)
        return bool((blocks == blocks[:, :1, :, :1]).all())
    ratio = ratio_of(pattern)
    assert ratio is not None
    n, m = ratio
    return columns % m == 0 and bool((kept.reshape(rows, columns // m, m).sum(-1) == n).all())


def pattern_of(kept: np.ndarray) -> str:
    """The most specific pattern of FORMAT.md that the zeros of `kept`, bool (rows, columns), follow exactly."""
    if not kept.any() or kept.all():
        return "unstructured"
    candidates = ["4x1", "1x4"]
    for m in (2, 4, 8, 16):
        if 0 < (n := int(np.count_nonzero(kept[0, :m]))) < m:
            candidates.append(f"{n}:{m}")
    # Check four rows first: they rule out nearly every pattern that does not fit.
    return next((p for p in candidates if pattern_holds(kept[:4], p) and pattern_holds(kept, p)), "unstructured")


def ratio_of(pattern: str) -> tuple[int, int] | None:
    """(n, m) of an n:m pattern, at most n kept of m consecutive inputs; None for anything else."""
    match = _RATIO.fullmatch(pattern)
    return (int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None


def is_prunable(name: str, ndim: int) -> bool:
    """Whether a tensor of this canonical name and number of dimensions is prunable: encoder linears and the pooler."""
    return name == POOLER_WEIGHT or is_encoder_weight(name, ndim)


def no_encoder(path: str | Path) -> str:
    """What is said of a model without linear weights of an encoder."""
    return f"{path}: {families.without_encoder()}"


def position_bits(weights: int, sparsity: float) -> float:
    """Entropy in bits of the positions of the non-zeros among `weights` weights with this sparsity."""
    density = 1 - sparsity
    if density in (0, 1):
        return 0.0
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    return weights * entropy


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by canonical name; only the headers of its files are read."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, stored in tensors_of(file):
            canonical = base_name(name)
            if canonical in tensors:
                raise InputError(f"{file}: {name} and another tensor are both {canonical}; keep only one of them")
            tensors[canonical] = stored
    return tensors
