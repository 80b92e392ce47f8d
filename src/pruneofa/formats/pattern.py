"""Sparsity patterns as NumPy: of a Hugging Face folder, compared, hashed. No torch.

The pattern of a stored model is where its encoder's linear weights are not zero. Tensors are read one at
a time, so that memory is bounded by the largest layer, whatever the size of the model.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.families import base_name, is_encoder_weight
from pruneofa.formats.tensors import StoredTensor, read_tensor, tensors_of, weight_files

POOLER = f"{families.POOLER}.weight"


def read_weights(
    path: str | Path, wanted: Callable[[str, int], bool] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (canonical name, array) of a Hugging Face folder or hub id, sorted by name, one tensor at a time.

    bfloat16 becomes float32, everything else keeps its dtype. `wanted(canonical name, ndim)` selects.
    Raises InputError when there is no such folder, no complete safetensors file in it, or only a .bin file.
    """
    for name, stored in sorted(_stored_tensors(local_folder(path)).items()):
        if wanted is None or wanted(name, len(stored.shape)):
            yield name, read_tensor(name, stored)


def local_folder(path: str | Path) -> Path:
    """The folder at `path`, or a snapshot of the hub model of that id (JSON, safetensors, packed and text files only).

    Raises InputError when it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the model's folder that contains it")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or str(path).startswith("."):
        raise InputError(f"{path}: no such folder; give a Hugging Face folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.zst", "*.txt"]))
    except (OSError, ValueError) as error:  # hub errors, offline, not cached
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: no such folder, and the hub gave no such model ({reason})") from None


def inspect(path: str | Path) -> dict[str, Any]:
    """Sparsity, sizes and hashes of the folder or hub id.

    Returns "encoder" (sparsity), "pooler" (sparsity or None), "layers" {name: {"shape", "sparsity",
    "nonzeros"}} with the pooler last, "weights" and "nonzeros" of the encoder's linears, "pattern_hash",
    "pooler_hash" (or None), "sizes" in bytes of the encoder's linears and "bits_per_weight" with the same
    keys: dense_fp32, nonzeros_bitmask_fp32, nonzeros_bitmask_int8 (non-zeros and one bit per weight) and
    entropy_bound_int8 (non-zeros of 8 bits and the least bits that say where they are, layer by layer).
    Raises InputError as `read_weights` does, and for a model without encoder linears.
    """
    encoder_hash, pooler_hash = hashlib.sha256(), None
    layers: dict[str, dict[str, Any]] = {}
    pooler: dict[str, dict[str, Any]] = {}
    for name, weight in read_weights(path, _prunable):
        kept = weight != 0
        nonzeros = int(np.count_nonzero(kept))
        layer = {"shape": list(kept.shape), "sparsity": 1 - nonzeros / kept.size, "nonzeros": nonzeros}
        if name == POOLER:
            pooler_hash = hashlib.sha256()
            pooler[name] = layer
        else:
            layers[name] = layer
        _add(pooler_hash if name == POOLER else encoder_hash, name, kept)
    if not layers:
        raise InputError(_nothing_there(path))
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
        "pooler": pooler[POOLER]["sparsity"] if pooler else None,
        "weights": weights,
        "nonzeros": nonzeros,
        "pattern_hash": encoder_hash.hexdigest(),
        "pooler_hash": pooler_hash.hexdigest() if pooler_hash else None,
        "sizes": sizes,
        "bits_per_weight": {key: 8 * size / weights for key, size in sizes.items()},
        "layers": layers | pooler,
    }


def verify(base: str | Path, derived: str | Path) -> dict[str, Any]:
    """Whether every zero of BASE's pattern is exactly zero in DERIVED (both folders or hub ids).

    Returns "ok"; "revived" [{"layer", "count"}], pruned in BASE and not zero in DERIVED, the pooler too
    where both have one; "missing", encoder layers of BASE that DERIVED lacks; "missing_pooler" (no failure:
    question-answering heads drop it); "checked", zeros of BASE that were compared; "extra_zeros", zeros of
    DERIVED that BASE does not have; "negative_zeros", -0.0 among the checked; and the number of "layers".
    ok = nothing revived and nothing missing. Raises InputError for models of different shapes or without
    encoder linears, and as `read_weights` does.
    """
    base_tensors = _pruned_tensors(base)
    derived_tensors = _pruned_tensors(derived)
    revived: list[dict[str, Any]] = []
    checked = extra = negative = 0
    common = [name for name in base_tensors if name in derived_tensors]
    for name in common:
        if base_tensors[name].shape != derived_tensors[name].shape:
            shapes = ["x".join(map(str, t[name].shape)) for t in (base_tensors, derived_tensors)]
            raise InputError(f"{name}: shape {shapes[1]} in {derived}, but {shapes[0]} in {base}: another model")
    for name in common:
        pruned = read_tensor(name, base_tensors[name]) == 0
        weight = read_tensor(name, derived_tensors[name])
        nonzero = weight != 0
        count = int(np.count_nonzero(nonzero & pruned))
        if count:
            revived.append({"layer": name, "count": count})
        checked += (zeros := int(np.count_nonzero(pruned)))
        derived_zeros = nonzero.size - int(np.count_nonzero(nonzero))
        extra += derived_zeros - (zeros - count)
        if weight.dtype.kind == "f":
            negative += int(np.count_nonzero(np.signbit(weight) & ~nonzero & pruned))
    missing = [name for name in base_tensors if name not in derived_tensors and name != POOLER]
    return {
        "ok": not revived and not missing,
        "revived": revived,
        "missing": missing,
        "missing_pooler": POOLER in base_tensors and POOLER not in derived_tensors,
        "checked": checked,
        "extra_zeros": extra,
        "negative_zeros": negative,
        "layers": len(common),
    }


def pattern_hash(kept: Mapping[str, np.ndarray]) -> str:
    """Hex sha256 of a pattern, {canonical name: bool array, True = kept}, independent of the order of keys.

    The hash runs over the layers sorted by name; each adds its name, a zero byte, the shape such as
    768x3072, a zero byte, and the bits in C order, packed little-endian and padded to a byte per layer.
    """
    digest = hashlib.sha256()
    for name in sorted(kept):
        _add(digest, name, kept[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, kept: np.ndarray) -> None:
    digest.update(name.encode() + b"\0" + "x".join(map(str, kept.shape)).encode() + b"\0")
    digest.update(np.packbits(kept, bitorder="little").tobytes())


def _prunable(name: str, ndim: int) -> bool:
    return name == POOLER or is_encoder_weight(name, ndim)


def _pruned_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Encoder linears and the pooler of a model, by canonical name in order, none of them read yet."""
    stored = sorted(_stored_tensors(local_folder(path)).items())
    found = {name: tensor for name, tensor in stored if _prunable(name, len(tensor.shape))}
    if not any(name != POOLER for name in found):
        raise InputError(_nothing_there(path))
    return found


def _nothing_there(path: str | Path) -> str:
    return f"{path}: {families.without_encoder()}"


def position_bits(weights: int, sparsity: float) -> float:
    """Least bits that tell which of so many weights are not zero: the binary entropy of their density."""
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
