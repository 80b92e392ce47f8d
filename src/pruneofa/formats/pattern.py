"""Sparsity patterns of stored models, with NumPy: block and n:m patterns, hashes, counts, comparison. No torch.

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
from pruneofa.families import base_name, canonical_name, is_encoder_weight
from pruneofa.formats.architecture import check_encoder
from pruneofa.formats.files import read_json
from pruneofa.formats.tensors import StoredTensor, read_tensor, tensors_of, weight_files, weights_folder

POOLER = f"{families.POOLER}.weight"
BLOCKS = {"unstructured": (1, 1), "4x1": (4, 1), "1x4": (1, 4)}  # (output rows, input columns) of a block
_RATIO = re.compile(r"([1-9]\d?):([1-9]\d?)", re.ASCII)


def read_weights(
    path: str | Path, wanted: Callable[[str, int], bool] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (canonical name, array) of a Hugging Face folder or hub id, sorted by name, one tensor at a time.

    bfloat16 becomes float32, everything else keeps its dtype. `wanted(canonical name, ndim)` selects.
    Raises InputError when there is no such folder or no complete weights in it, and as `weights_folder` does.
    """
    for name, stored in sorted(_stored_tensors(weights_folder(path)).items()):
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
    layers = {name: layer for name, layer in found.items() if name != POOLER}
    if not layers:
        raise InputError(_no_encoder(path))
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
        "pooler": found[POOLER]["sparsity"] if POOLER in found else None,
        "weights": weights,
        "nonzeros": nonzeros,
        "pattern_hash": encoder_hash,
        "pooler_hash": pooler_hash,
        "sizes": sizes,
        "bits_per_weight": {key: 8 * size / weights for key, size in sizes.items()},
        "layers": layers | {name: layer for name, layer in found.items() if name == POOLER},
    }


def verify(base: str | Path, derived: str | Path) -> dict[str, Any]:
    """Check that every zero of BASE's pattern is exactly zero in DERIVED (both folders or hub ids).

    Returns "ok"; "revived" [{"layer", "count"}], weights that are zero in BASE but not in DERIVED, with the
    pooler if both have one; "not_finite" [{"layer", "count"}], weights of DERIVED that are NaN or infinite;
    "missing", encoder layers of BASE that DERIVED lacks; "missing_pooler" (not a failure: question-answering
    models have none); "checked", zeros of BASE that were compared; "extra_zeros", zeros of DERIVED that BASE does
    not have; "negative_zeros", -0.0 among the checked; and the number of "layers".
    ok = nothing revived, not finite or missing. Raises InputError for models of different shapes or without
    encoder linears, and as `read_weights` does.
    """
    check_config(base)
    base_tensors = _pruned_tensors(base)
    derived_tensors = _pruned_tensors(derived)
    revived: list[dict[str, Any]] = []
    not_finite: list[dict[str, Any]] = []
    checked = extra = negative = 0
    common = [name for name in base_tensors if name in derived_tensors]
    for name in common:
        if base_tensors[name].shape != derived_tensors[name].shape:
            shapes = ["x".join(map(str, t[name].shape)) for t in (base_tensors, derived_tensors)]
            raise InputError(f"{name}: shape {shapes[1]} in {derived}, but {shapes[0]} in {base}; wanted equal shapes")
    for name in common:
        pruned = read_tensor(name, base_tensors[name]) == 0
        weight = read_tensor(name, derived_tensors[name])
        nonzero = weight != 0
        finite = np.isfinite(weight)
        if bad := finite.size - int(np.count_nonzero(finite)):
            not_finite.append({"layer": name, "count": bad})
        if count := int(np.count_nonzero(nonzero & pruned & finite)):
            revived.append({"layer": name, "count": count})
        checked += (zeros := int(np.count_nonzero(pruned)))
        derived_zeros = nonzero.size - int(np.count_nonzero(nonzero))
        extra += derived_zeros - (zeros - int(np.count_nonzero(nonzero & pruned)))
        if weight.dtype.kind == "f":
            negative += int(np.count_nonzero(np.signbit(weight) & ~nonzero & pruned))
    missing = [name for name in base_tensors if name not in derived_tensors and name != POOLER]
    if not missing:
        check_config(derived)
    return {
        "ok": not (revived or not_finite or missing),
        "revived": revived,
        "not_finite": not_finite,
        "missing": missing,
        "missing_pooler": POOLER in base_tensors and POOLER not in derived_tensors,
        "checked": checked,
        "extra_zeros": extra,
        "negative_zeros": negative,
        "layers": len(common),
    }


def check_config(path: str | Path) -> None:
    """Check that the encoder's tensors are those that config.json, if there is one, gives.

    Raises InputError naming the first that is missing, of another shape or beyond the last layer, and as
    `read_weights` does.
    """
    folder = weights_folder(path)
    if not (folder / "config.json").is_file():
        return
    stored = {canonical_name(name): tensor.shape for name, tensor in _stored_tensors(folder).items()}
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
        if name == POOLER:
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
    return name == POOLER or is_encoder_weight(name, ndim)


def _pruned_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Encoder linears and the pooler of a model, sorted by canonical name; their data are not read."""
    stored = sorted(_stored_tensors(weights_folder(path)).items())
    found = {name: tensor for name, tensor in stored if is_prunable(name, len(tensor.shape))}
    if not any(name != POOLER for name in found):
        raise InputError(_no_encoder(path))
    return found


def _no_encoder(path: str | Path) -> str:
    return f"{path}: {families.without_encoder()}"


def position_bits(weights: int, sparsity: float) -> float:
    """Entropy in bits of the positions of the non-zeros among `weights` weights with this sparsity."""
    density = 1 - sparsity
    if density in (0, 1):
        return 0.0
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    return weights * entropy


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by canonical name; only the headers of its files are read."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, stored in tensors_of(file):
            canonical = base_name(name)
            if canonical in tensors:
                raise InputError(f"{file}: {name} and another tensor are both {canonical}; keep only one of them")
            tensors[canonical] = stored
    return tensors
