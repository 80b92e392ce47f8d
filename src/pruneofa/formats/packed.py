"""The packed folder of FORMAT.md, read and checked. No torch. `pruneofa.formats.pack` writes it.

The sizes come first: nothing is allocated before the file has shown that it holds as many bytes. Whatever the
manifest says of the tensors is then computed from them again.
"""

import contextlib
import hashlib
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.errors import InputError, first_line
from pruneofa.formats.manifest import (
    AGAIN,
    MANIFEST,
    MAX_JSON,
    MAX_WINDOW,
    METADATA,
    Slot,
    is_count,
    layout,
    parse_json,
    read_config,
    read_manifest,
    tensor_file,
)
from pruneofa.formats.pattern import POOLER, local_folder

MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 times it is finite ...
_MAX_SCALE_128 = np.finfo(np.float32).max / np.float32(128)  # ... and 128 times this
_CHUNK = 1 << 20  # a decompressor makes a copy of what it gives
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}


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
            raise InputError("values has a zero, which no kept weight is")
        if self.negative_zeros is not None:
            if self.scale is not None:
                raise InputError("negative_zeros beside int8 values, which have no negative zero")
            _check_bits("negative_zeros", self.negative_zeros, rows, columns)
            if (self.negative_zeros & self.bitmask).any():
                raise InputError("negative_zeros marks a weight that bitmask keeps")

    @property
    def kept(self) -> np.ndarray:
        """Bool (rows, columns): which weights are part of the pattern."""
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
    """A packed model in memory; tensors by canonical name, `plain` ones float32."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    linears: dict[str, PackedLinear]
    embeddings: dict[str, PackedEmbedding]
    plain: dict[str, np.ndarray]
    folder: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{canonical name: shape} of every tensor, a decoder that is tied to the word embeddings excepted."""
        linears = {name: linear.shape for name, linear in self.linears.items()}
        tables = {name: table.values.shape for name, table in self.embeddings.items()}
        return linears | tables | {name: array.shape for name, array in self.plain.items()}


def read(path: str | Path) -> Packed:
    """The packed folder or hub id at `path`, checked in full.

    Raises InputError, with the file and the fault, for anything that FORMAT.md does not allow.
    """
    folder = local_folder(path)
    manifest = read_manifest(folder)
    config = read_config(folder, manifest)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json in it; {AGAIN}")
    file = folder / tensor_file(manifest)
    arrays = _read_arrays(file, manifest)
    linears: dict[str, PackedLinear] = {}
    embeddings: dict[str, PackedEmbedding] = {}
    plain: dict[str, np.ndarray] = {}
    for name, entry in manifest["tensors"].items():
        stored: dict[str, Any] = {
            part: arrays.pop(f"{name}.{part}", None) for part in ("values", "scale", "bitmask", "negative_zeros")
        }
        try:
            if entry["kind"] == "linear":
                linears[name] = PackedLinear(tuple(entry["shape"]), **stored)
                _check_claims(linears[name], entry)
            elif entry["kind"] == "embedding":
                values = arrays.pop(name) if stored["values"] is None else stored["values"]
                embeddings[name] = PackedEmbedding(values, stored["scale"])
            elif entry["kind"] == "plain":
                plain[name] = arrays.pop(name)
                _check_finite("it", plain[name])
        except InputError as error:
            raise InputError(f"{file}: {name}: {error}; {AGAIN}") from None
    for key, hashed in zip(("pattern_hash", "pooler_hash"), pattern_hashes(linears), strict=True):
        if manifest[key] != hashed:
            raise InputError(f"{folder / MANIFEST}: {key} is {manifest[key]}, but {hashed} by the bitmasks; {AGAIN}")
    return Packed(manifest, config, linears, embeddings, plain, folder)


def inspect(path: str | Path) -> dict[str, Any]:
    """What the manifest says, with the keys of `pattern.inspect`; the tensors are not read."""
    manifest = read_manifest(local_folder(path))
    sizes = manifest["sizes"]
    layers = {
        name: {
            "shape": entry["shape"],
            "sparsity": 1 - entry["nonzeros"] / math.prod(entry["shape"]),
            "nonzeros": entry["nonzeros"],
            "pattern": entry["pattern"],
        }
        for name, entry in sorted(manifest["tensors"].items(), key=lambda item: (item[0] == POOLER, item[0]))
        if entry["kind"] == "linear"
    }
    return {
        "format": f"packed, version {manifest['version']}",
        "precision": manifest["precision"],
        "compression": manifest["compression"],
        "encoder": manifest["sparsity"],
        "pooler": layers[POOLER]["sparsity"] if POOLER in layers else None,
        "pattern_hash": manifest["pattern_hash"],
        "pooler_hash": manifest["pooler_hash"],
        **{key: value for key, value in sizes.items() if "bits" in key or "bound" in key},
        "sizes": {key: value for key, value in sizes.items() if isinstance(value, int)},
        "layers": layers,
    }


def unpack_bits(bits: np.ndarray, columns: int) -> np.ndarray:
    """Bool (rows, columns) of a bitmask uint8 (rows, ceil(columns / 8))."""
    return np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(bool)


def pattern_holds(kept: np.ndarray, pattern: str) -> bool:
    """Whether the zeros of `kept`, bool (rows, columns), are exactly of this pattern (design of `masks.py`)."""
    rows, columns = kept.shape
    if pattern == "unstructured":
        return True
    if pattern == "4x1":
        blocks = kept.reshape(rows // 4, 4, columns) if rows % 4 == 0 else None
        return blocks is not None and bool((blocks == blocks[:, :1]).all())
    if pattern == "1x4":
        blocks = kept.reshape(rows, columns // 4, 4) if columns % 4 == 0 else None
        return blocks is not None and bool((blocks == blocks[..., :1]).all())
    n, m = map(int, pattern.split(":"))
    return columns % m == 0 and bool((kept.reshape(rows, columns // m, m).sum(-1) == n).all())


def pattern_hashes(linears: Mapping[str, PackedLinear]) -> tuple[str, str | None]:
    """`pattern.pattern_hash` of the encoder, and of the pooler where there is one, straight from the bitmasks."""
    encoder, pooler = hashlib.sha256(), None
    for name in sorted(linears):
        rows, columns = linears[name].shape
        bits = linears[name].bitmask
        if columns % 8:  # the hash pads once at the end, a bitmask in every row
            bits = np.packbits(linears[name].kept, bitorder="little")
        if name == POOLER:
            pooler = hashlib.sha256()
        digest = pooler if pooler is not None and name == POOLER else encoder
        digest.update(f"{name}\0{rows}x{columns}\0".encode())
        digest.update(bits.reshape(-1).data)
    return encoder.hexdigest(), pooler.hexdigest() if pooler else None


def _check_claims(linear: PackedLinear, entry: Mapping[str, Any]) -> None:
    """What the manifest says of a linear beyond sizes; kernels rely on the pattern."""
    marked = 0 if linear.negative_zeros is None else _ones(linear.negative_zeros)
    if marked != entry.get("negative_zeros", 0):
        raise InputError(f"{marked} negative zeros marked, but {entry.get('negative_zeros')} in the manifest")
    if entry["pattern"] != "unstructured" and not pattern_holds(linear.kept, entry["pattern"]):
        raise InputError(f"its zeros are not of pattern {entry['pattern']}, as the manifest says")


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
        raise InputError(f"scale has a number that is not above 0 and at most {most:.6e}")


def _check_finite(what: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{what} has NaN or infinity")


def _ones(bits: np.ndarray) -> int:
    """Number of bits set in a uint8 array."""
    flat = bits.reshape(-1)
    whole = flat[: flat.size // 8 * 8].view(np.uint64)  # eight bytes at a time
    return sum(int(np.bitwise_count(part).sum(dtype=np.int64)) for part in (whole, flat[whole.size * 8 :]))


def _read_arrays(file: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of the file that the manifest implies, each in memory of its own."""
    slots = layout(manifest["tensors"], manifest["precision"])
    size = manifest["sizes"]["file"]
    with _opened(file, manifest) as raw:
        stream = _Stream(raw, file)
        length = int.from_bytes(stream.take(8).tobytes(), "little")
        data = sum(slot.nbytes for slot in slots.values())
        if length > MAX_JSON or 8 + length + data != size:
            wanted = f"{size - 8 - data}, as {MANIFEST} says"
            raise InputError(f"{file}: a header of {length} bytes; wanted {wanted}; {AGAIN}")
        arrays = {}
        for name in _checked_header(stream.take(length).tobytes(), slots, str(file)):
            slot = slots[name]
            arrays[name] = stream.take(slot.nbytes).view(DTYPES[slot.dtype]).reshape(slot.shape)
        if raw.read(1):
            raise InputError(f"{file}: goes on after the {size} bytes that {MANIFEST} says; {AGAIN}")
    if (checksum := f"crc32:{stream.crc:08x}") != manifest["checksum"]:
        raise InputError(f"{file}: damaged: {checksum}, but {manifest['checksum']} in {MANIFEST}; {AGAIN}")
    return arrays


class _Stream:
    """Exact numbers of bytes of `raw`, an open file or a zstd reader, and the CRC-32 of all that was taken."""

    def __init__(self, raw: Any, file: Path) -> None:
        self.raw, self.file, self.crc, self.taken = raw, file, 0, 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` bytes, as an array of its own. Raises InputError where the file ends."""
        buffer = np.empty(count, np.uint8)
        view, done = buffer.data, 0
        while done < count:
            if not (got := self.raw.readinto(view[done : done + _CHUNK])):
                raise InputError(f"{self.file}: ends after {self.taken + done} bytes; {AGAIN}")
            done += got
        self.taken += count
        self.crc = zlib.crc32(buffer.data, self.crc)
        return buffer


@contextlib.contextmanager
def _opened(file: Path, manifest: Mapping[str, Any]) -> Iterator[Any]:
    """The tensor file as a stream of its bytes before compression, once its size is what the manifest says."""
    sizes = manifest["sizes"]
    wanted = sizes["compressed"] if manifest["compression"] else sizes["file"]
    try:
        with open(file, "rb") as raw:
            if (size := os.fstat(raw.fileno()).st_size) != wanted:
                raise InputError(f"{file}: {size} bytes; wanted {wanted}, as {MANIFEST} says; {AGAIN}")
            if not manifest["compression"]:
                yield raw
                return
            from pruneofa.formats.zstd import DecompressionParameter, ZstdError, ZstdFile, get_frame_info, window_size

            try:
                head = raw.read(64)
                size, window = get_frame_info(head).decompressed_size, window_size(head)
                if size != sizes["file"] or window > MAX_WINDOW:
                    stated = f"{'an unknown number of' if size is None else size} bytes with a window of {window}"
                    raise InputError(
                        f"{file}: unpacks to {stated}; wanted {sizes['file']} and at most {MAX_WINDOW}; {AGAIN}"
                    )
                raw.seek(0)
                limit = {DecompressionParameter.window_log_max: MAX_WINDOW.bit_length() - 1}
                with ZstdFile(raw, options=limit) as reader:
                    yield reader
            except (ZstdError, EOFError) as error:
                raise InputError(f"{file}: not a whole zstd file ({first_line(error)}); {AGAIN}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or first_line(error)}); {AGAIN}") from None


def _checked_header(raw: bytes, slots: Mapping[str, Slot], where: str) -> list[str]:
    """The names of a safetensors header in the order of their bytes; it must say of each what the manifest implies."""
    found = parse_json(raw, f"{where}: header")
    if not isinstance(found, dict) or not raw.startswith(b"{"):
        raise InputError(f"{where}: header is not a JSON object; {AGAIN}")
    if found.pop("__metadata__", None) != METADATA:
        raise InputError(f"{where}: header has no __metadata__ of {METADATA}; {AGAIN}")
    for name in [name for name in slots if name not in found] + [name for name in found if name not in slots]:
        holds, lacks = (MANIFEST, "the header") if name in slots else ("the header", MANIFEST)
        raise InputError(f"{where}: tensor {ascii(name)[:99]} is in {holds}, but not in {lacks}; {AGAIN}")
    places = []
    for name, slot in slots.items():
        entry = found[name]

        def want(good: bool, got: Any, wanted: str, name: str = name) -> None:
            if not good:
                raise InputError(f"{where}: header: {name}: {ascii(got)[:80]}; wanted {wanted}; {AGAIN}")

        good = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
        want(good, entry, "dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        want(dtype == slot.dtype, dtype, f"dtype {slot.dtype}")
        want(_is_counts(shape) and tuple(shape) == slot.shape, shape, f"shape {list(slot.shape)}")
        good = _is_counts(offsets) and len(offsets) == 2 and offsets[1] - offsets[0] == slot.nbytes
        want(good, offsets, f"data_offsets of {slot.nbytes} bytes")
        places.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(places):
        if start != end:
            raise InputError(f"{where}: header: {name} starts at {start}; wanted {end}, no hole or overlap; {AGAIN}")
        end = stop
    return [name for *_, name in sorted(places)]


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value))
