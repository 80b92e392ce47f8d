"""Read and check the packed folder of FORMAT.md, which `pruneofa.formats.pack` writes. No torch.

All statements of the manifest about the tensors are verified against the tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats.hub import local_folder
from pruneofa.formats.manifest import AGAIN, MANIFEST, InputScales, Manifest, Tensor, read_config
from pruneofa.formats.manifest_reader import read_manifest
from pruneofa.formats.pattern import packed_bits, pattern_hashes, pattern_holds
from pruneofa.formats.tensor_file import read_arrays

MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 * MAX_SCALE is finite
_MAX_SCALE_128 = np.finfo(np.float32).max / np.float32(128)  # 128 * _MAX_SCALE_128 is finite


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """The weight (rows, columns) of a linear layer: which weights are kept, and their values row by row.

    `bitmask` uint8 (rows, ceil(columns / 8)), little-endian bits, 1 = kept, spare bits 0; `values` (nonzeros,)
    int8 with a `scale` float32 (rows,) > 0, or float32 without; `negative_zeros` a bitmask of the weights
    that are -0.0, or None.

    Raises:
        InputError: an array contradicts another or the shape.
    """

    shape: tuple[int, int]
    bitmask: np.ndarray
    values: np.ndarray
    scale: np.ndarray | None = None
    negative_zeros: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        _check_bits("bitmask", self.bitmask, rows, columns)
        if (kept := _ones(self.bitmask)) != self.values.size:
            raise InputError(f"bitmask has {kept} bits set, but there are {self.values.size} values")
        _check_values(self.values, self.scale, rows, lowest=-128)
        if self.values.dtype != np.int8 and not self.values.all():
            raise InputError("values contains a zero; wanted kept weights, which are not zero")
        if self.negative_zeros is not None:
            if self.scale is not None:
                raise InputError("negative_zeros given with int8 values, which have no negative zero")
            _check_bits("negative_zeros", self.negative_zeros, rows, columns)
            if (self.negative_zeros & self.bitmask).any():
                raise InputError("negative_zeros marks a weight that bitmask keeps")

    @property
    def pattern_bits(self) -> np.ndarray:
        """The pattern as `pattern.packed_bits` returns it: padded only at the end, where `bitmask` pads every row."""
        return packed_bits(self.kept) if self.shape[1] % 8 else self.bitmask

    @property
    def kept(self) -> np.ndarray:
        """Bool (rows, columns), True = kept."""
        return unpack_bits(self.bitmask, self.shape[1])

    def dense(self) -> np.ndarray:
        """The weight as float32 (rows, columns); int8 values times their row's scale."""
        weight = np.zeros(self.shape, np.float32)
        weight[self.kept] = self.values
        if self.scale is not None:
            weight *= self.scale[:, None]
        if self.negative_zeros is not None:
            weight[unpack_bits(self.negative_zeros, self.shape[1])] = np.float32(-0.0)
        return weight


@dataclass(frozen=True, eq=False)
class PackedEmbedding:
    """An embedding table: `values` (rows, columns) int8 with a `scale` float32 (rows,) > 0, or float32 without.

    Raises:
        InputError: the arrays contradict each other.
    """

    values: np.ndarray
    scale: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_values(self.values, self.scale, len(self.values))

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """The rows of the integers `ids` (...,), or of a slice, as float32 (..., columns)."""
        rows = self.values[ids].astype(np.float32)
        return rows if self.scale is None else rows * self.scale[ids, None]


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed model in memory, as the engine needs it.

    Attributes:
        folder: the source folder, which has the settings and the tokenizer.
        config: the object of config.json.
        precision: int8 or fp32.
        input_scales: scales of static activations; None if they are dynamic.
        quantized: whether the scales are those of quantization-aware training.
        linears: sparse linear weights by canonical name.
        embeddings: embedding tables by canonical name.
        plain: all other tensors, float32 arrays by canonical name.
    """

    folder: Path
    config: dict[str, Any]
    precision: str
    input_scales: InputScales | None
    quantized: bool
    linears: dict[str, PackedLinear]
    embeddings: dict[str, PackedEmbedding]
    plain: dict[str, np.ndarray]

    def hashes(self) -> tuple[str, str | None]:
        """`pattern.pattern_hash` of the encoder, and of the pooler or None, computed from the bitmasks."""
        layers = sorted(self.linears.items())
        return pattern_hashes((name, linear.shape, linear.pattern_bits) for name, linear in layers)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{canonical name: shape} of every tensor, except a decoder that is tied to the word embeddings."""
        linears = {name: linear.shape for name, linear in self.linears.items()}
        tables = {name: table.values.shape for name, table in self.embeddings.items()}
        return linears | tables | {name: array.shape for name, array in self.plain.items()}


def read(path: str | Path) -> Packed:
    """The packed folder or hub id at `path`, checked in full.

    Raises InputError, naming the file and the error, for anything that FORMAT.md does not allow.
    """
    folder = local_folder(path)
    return read_with(folder, read_manifest(folder))


def read_with(folder: Path, manifest: Manifest) -> Packed:
    """`read` of a folder whose manifest is known. Raises as it does."""
    config = read_config(folder, manifest)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json in it; {AGAIN}")
    file = folder / manifest.tensor_file
    arrays = read_arrays(file, manifest)
    quantized = manifest.quantized or manifest.input_scales is not None
    packed = Packed(folder, config, manifest.precision, manifest.input_scales, quantized, {}, {}, {})
    for name, tensor in manifest.tensors.items():
        stored: dict[str, Any] = {
            part: arrays.pop(f"{name}.{part}", None) for part in ("values", "scale", "bitmask", "negative_zeros")
        }
        try:
            if tensor.kind == "linear":
                packed.linears[name] = PackedLinear((tensor.shape[0], tensor.shape[1]), **stored)
                _check_entry(packed.linears[name], tensor)
            elif tensor.kind == "embedding":
                values = arrays.pop(name) if stored["values"] is None else stored["values"]
                packed.embeddings[name] = PackedEmbedding(values, stored["scale"])
            elif tensor.kind == "plain":
                packed.plain[name] = arrays.pop(name)
                _check_finite("the tensor", packed.plain[name])
        except InputError as error:
            raise InputError(f"{file}: {name}: {error}; {AGAIN}") from None
    stated = {"pattern_hash": manifest.pattern_hash, "pooler_hash": manifest.pooler_hash}
    for (key, value), hashed in zip(stated.items(), packed.hashes(), strict=True):
        if value != hashed:
            raise InputError(f"{folder / MANIFEST}: {key} is {value}, but the bitmasks have {hashed}; {AGAIN}")
    return packed


def inspect(path: str | Path) -> dict[str, Any]:
    """The figures of the manifest with the keys of `pattern.inspect`; the tensors are not read."""
    manifest = read_manifest(local_folder(path))
    stated = manifest.to_json()
    sizes = stated["sizes"]
    layers = {
        name: {
            "shape": list(tensor.shape),
            "sparsity": tensor.sparsity,
            "nonzeros": tensor.nonzeros,
            "pattern": tensor.pattern,
        }
        for name, tensor in sorted(manifest.tensors.items(), key=lambda item: (item[0] == POOLER_WEIGHT, item[0]))
        if tensor.kind == "linear"
    }
    return {
        "format": f"packed, version {stated['version']}",
        "precision": manifest.precision,
        "compression": manifest.compression,
        "encoder": manifest.sparsity,
        "pooler": layers[POOLER_WEIGHT]["sparsity"] if POOLER_WEIGHT in layers else None,
        "pattern_hash": manifest.pattern_hash,
        "pooler_hash": manifest.pooler_hash,
        **{key: value for key, value in sizes.items() if "bits" in key or "bound" in key},
        "sizes": {key: value for key, value in sizes.items() if isinstance(value, int)},
        "layers": layers,
    }


def unpack_bits(bits: np.ndarray, columns: int) -> np.ndarray:
    """Bool (rows, columns) of a bitmask uint8 (rows, ceil(columns / 8))."""
    return np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(bool)


def _check_entry(linear: PackedLinear, tensor: Tensor) -> None:
    """Check the manifest's other entries for a linear, such as its pattern, which the kernels rely on."""
    marked = 0 if linear.negative_zeros is None else _ones(linear.negative_zeros)
    if marked != (tensor.negative_zeros or 0):
        raise InputError(f"{marked} negative zeros marked, but {tensor.negative_zeros} in the manifest")
    assert tensor.pattern is not None
    if tensor.pattern != "unstructured" and not pattern_holds(linear.kept, tensor.pattern):
        raise InputError(f"its zeros do not have pattern {tensor.pattern}, which the manifest states")


def _check_bits(what: str, bits: np.ndarray, rows: int, columns: int) -> None:
    if bits.dtype != np.uint8 or bits.shape != (rows, -(-columns // 8)):
        raise InputError(f"{what} is {bits.dtype} {bits.shape}; wanted uint8 {(rows, -(-columns // 8))}")
    if columns % 8 and (bits[:, -1] >> (columns % 8)).any():
        raise InputError(f"{what} has bits set beyond column {columns}")


def _check_values(values: np.ndarray, scale: np.ndarray | None, rows: int, lowest: int = -127) -> None:
    wanted = np.dtype(np.float32 if scale is None else np.int8)
    if values.dtype != wanted:
        raise InputError(f"values is {values.dtype}; wanted {wanted} {'without' if scale is None else 'with'} scale")
    if scale is None:
        _check_finite("values", values)
        return
    least = values.min() if values.size else 0
    if least < lowest:
        raise InputError("values has -128; wanted -127 to 127 in an embedding table")
    if scale.dtype != np.float32 or scale.shape != (rows,):
        raise InputError(f"scale is {scale.dtype} {scale.shape}; wanted float32 {(rows,)}")
    _check_finite("scale", scale)
    most = _MAX_SCALE_128 if least == -128 else MAX_SCALE
    if not ((scale > 0) & (scale <= most)).all():
        raise InputError(f"scale contains a number that is not above 0 and at most {most:.6e}")


def _check_finite(what: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{what} contains NaN or infinity")


def _ones(bits: np.ndarray) -> int:
    """Number of bits set in a uint8 array."""
    flat = bits.reshape(-1)
    whole = flat[: flat.size // 8 * 8].view(np.uint64)  # eight bytes at a time
    return sum(int(np.bitwise_count(part).sum(dtype=np.int64)) for part in (whole, flat[whole.size * 8 :]))
