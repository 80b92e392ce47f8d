"""Read the tensor file of a packed folder, compressed or not, according to its manifest.

Sizes are checked first: memory is allocated only for bytes that the file contains.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.errors import InputError, first_line
from pruneofa.formats.files import MAX_JSON, open_regular, parse_json
from pruneofa.formats.layout import Slot, layout
from pruneofa.formats.manifest import AGAIN, MANIFEST, MAX_WINDOW, METADATA, Manifest, is_count

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}
_CHUNK = 1 << 20  # bytes read at a time, because a decompressor returns copies


def read_arrays(file: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Every tensor of the file, by name: an array of the dtype and shape of its slot, with its own memory.

    bfloat16 is uint16, its bits. Raises InputError for a file that is damaged or not the one of the manifest.
    """
    slots = layout(manifest.tensors, manifest.precision)
    size = manifest.sizes.file
    with _opened(file, manifest) as raw:
        stream = _Stream(raw, file)
        length = int.from_bytes(stream.take(8).tobytes(), "little")
        data = sum(slot.nbytes for slot in slots.values())
        if length > MAX_JSON or 8 + length + data != size:
            wanted = f"{size - 8 - data}, as {MANIFEST} states"
            raise InputError(f"{file}: the header has {length} bytes; wanted {wanted}; {AGAIN}")
        arrays = {}
        for name in _checked_header(stream.take(length).tobytes(), slots, str(file)):
            slot = slots[name]
            arrays[name] = stream.take(slot.nbytes).view(DTYPES[slot.dtype]).reshape(slot.shape)
        if raw.read(1):
            raise InputError(f"{file}: has data after the {size} bytes that {MANIFEST} states; {AGAIN}")
    if (checksum := f"crc32:{stream.crc:08x}") != manifest.checksum:
        raise InputError(f"{file}: damaged: {checksum}, but {manifest.checksum} in {MANIFEST}; {AGAIN}")
    return arrays


class _Stream:
    """Reads exact numbers of bytes from `raw`, an open file or a zstd reader, and keeps the CRC-32 of them all."""

    def __init__(self, raw: Any, file: Path) -> None:
        self.raw, self.file, self.crc, self.taken = raw, file, 0, 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` bytes as a new array. Raises InputError if the file ends before them."""
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
def _opened(file: Path, manifest: Manifest) -> Iterator[Any]:
    """The uncompressed tensor file as a stream, after checking that its size is that of the manifest."""
    sizes = manifest.sizes
    wanted = sizes.compressed if manifest.compression else sizes.file
    try:
        with open_regular(file) as raw:
            if (size := os.fstat(raw.fileno()).st_size) != wanted:
                raise InputError(f"{file}: {size} bytes; wanted {wanted}, as {MANIFEST} states; {AGAIN}")
            if not manifest.compression:
                yield raw
                return
            from pruneofa.formats.zstd import Frame, ZstdError, get_frame_info, window_size

            try:
                head = raw.read(64)
                size, window = get_frame_info(head).decompressed_size, window_size(head)
                if size != sizes.file or window > MAX_WINDOW:
                    stated = f"{'an unknown number of' if size is None else size} bytes with a window of {window}"
                    raise InputError(
                        f"{file}: decompresses to {stated}; wanted {sizes.file} and at most {MAX_WINDOW}; {AGAIN}"
                    )
                raw.seek(0)
                yield Frame(raw, MAX_WINDOW)
            except (ZstdError, EOFError) as error:
                raise InputError(f"{file}: not a complete zstd file ({first_line(error)}); {AGAIN}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or first_line(error)}); {AGAIN}") from None


def _checked_header(raw: bytes, slots: Mapping[str, Slot], where: str) -> list[str]:
    """The tensor names of a safetensors header in file order. Raises InputError if it contradicts the manifest."""
    found = parse_json(raw, f"{where}: header", AGAIN)
    if not raw.startswith(b"{"):
        raise InputError(f"{where}: header does not begin with an object; {AGAIN}")
    if found.pop("__metadata__", None) != METADATA:
        raise InputError(f"{where}: header has no __metadata__ of {METADATA}; {AGAIN}")
    for name in [name for name in slots if name not in found] + [name for name in found if name not in slots]:
        present, absent = (MANIFEST, "the header") if name in slots else ("the header", MANIFEST)
        raise InputError(f"{where}: tensor {ascii(name)[:99]} is in {present}, but not in {absent}; {AGAIN}")
    ranges = []
    for name, slot in slots.items():
        entry = found[name]

        def want(good: bool, got: Any, wanted: str, name: str = name) -> None:
            if not good:
                raise InputError(f"{where}: header: {name}: {ascii(got)[:80]}; wanted {wanted}; {AGAIN}")

        good = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
        want(good, entry, "dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        want(dtype == slot.dtype, dtype, f"dtype {slot.dtype}")
        want(_are_counts(shape) and tuple(shape) == slot.shape, shape, f"shape {list(slot.shape)}")
        good = _are_counts(offsets) and len(offsets) == 2 and offsets[1] - offsets[0] == slot.nbytes
        want(good, offsets, f"data_offsets of {slot.nbytes} bytes")
        ranges.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(ranges):
        if start != end:
            raise InputError(f"{where}: header: {name} starts at {start}; wanted {end}, no gap or overlap; {AGAIN}")
        end = stop
    return [name for *_, name in sorted(ranges)]


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value))
