"""Hugging Face folder to packed folder (FORMAT.md). No torch; `packed` reads it and `unpack` gives the folder back.

Tensors are read one at a time: memory holds the packed model and one tensor, never the dense model.
"""

import itertools
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pruneofa.errors import InputError
from pruneofa.formats import scales
from pruneofa.formats.architecture import check_tensors, read_architecture
from pruneofa.formats.convert import convert
from pruneofa.formats.describe import TensorFile, describe, describe_tensors
from pruneofa.formats.files import new_output, write_json
from pruneofa.formats.layout import Slot, header, layout
from pruneofa.formats.manifest import (
    COMPRESSED,
    MANIFEST,
    MAX_RATIO,
    MAX_SLACK,
    METADATA,
    TENSORS,
    Manifest,
    Tensor,
    is_packed,
)
from pruneofa.formats.manifest_reader import parse_manifest
from pruneofa.formats.packed import Packed
from pruneofa.formats.sentence import max_length, read_sentence
from pruneofa.formats.settings import copy_settings, read_tokenizer, without_tokenizer
from pruneofa.formats.source import source_tensors
from pruneofa.formats.tensors import weight_files, weights_folder
from pruneofa.progress import progress

_CHUNK = 1 << 20


def pack(source: str | Path, out: str | Path, *, precision: str = "int8", compress: bool = False) -> Manifest:
    """Write the packed folder `out` of a Hugging Face folder or hub id; returns its manifest.

    With int8, embedding tables are quantized too, even those that quantization-aware training left float; see
    `difference_from_training`.

    Args:
        source: a model of one of `pruneofa.families` with float32, float16 or bfloat16 weights.
        out: a folder that does not exist yet, or is empty.
        precision: "int8", or "fp32", from which `unpack` restores every bit.
        compress: compress the tensors with zstd, for transport.

    Raises:
        InputError: the source cannot be packed, the engine would refuse it, or `out` is not empty.
    """
    folder = weights_folder(source)
    with new_output(out) as temporary:
        if not (folder / "tokenizer.json").is_file() and not is_packed(folder):
            weight_files(folder)  # raises for a folder that is no model's
            raise InputError(without_tokenizer(folder))
        # Every tensor is read twice: to convert it, and to hash the source.
        steps = 0 if is_packed(folder) else 2 * len(source_tensors(folder))
        with progress(f"packing {source}", steps) as advance:
            model = convert(folder, precision, advance=advance)
            tensors = describe_tensors(model)
            copy_settings(folder, temporary)
            file = _write_tensors(model, tensors, temporary, compress)
            manifest = describe(model, tensors, file, advance)
        parse_manifest(manifest.to_json(), str(folder))  # the output can be read
        check_engine_runs(model)
        write_json(temporary / MANIFEST, manifest.to_json())
    return manifest


def check_engine_runs(model: Packed) -> None:
    """Raises InputError for a model that the engine would refuse, by its configuration, tensors or tokenizer."""
    architecture = read_architecture(model.config, model.folder)
    check_tensors(architecture, model.shapes, model.folder, head=read_sentence(model.folder) is None)
    max_length(model.folder)
    read_tokenizer(model.folder, model.shapes[architecture.tables["word"]][0])


def difference_from_training(source: str | Path, precision: str) -> str | None:
    """How the packed form of a quantized folder differs from the trained model, in one line; None if it does not."""
    if (quantized := scales.read(weights_folder(source))) is None:
        return None
    if precision == "fp32":
        return (
            f"fp32 omits the int8 scales of {source}: running it as int8 later computes different ones; to keep them, "
            "pack it without --precision fp32"
        )
    if quantized.embeddings is None:
        return (
            f"packing changed the embedding tables of {source} from float to int8: the engine does not compute exactly "
            "what was trained; to train with int8 tables, quantize with embeddings: true"
        )
    return None


def _write_tensors(packed: Packed, tensors: Mapping[str, Tensor], folder: Path, compress: bool) -> TensorFile:
    """Write the tensor file, compressed or not."""
    arrays: dict[str, np.ndarray | None] = dict(packed.plain)
    for name, linear in packed.linears.items():
        arrays |= {f"{name}.bitmask": linear.bitmask, f"{name}.values": linear.values}
        arrays |= {f"{name}.scale": linear.scale, f"{name}.negative_zeros": linear.negative_zeros}
    for name, table in packed.embeddings.items():
        arrays |= {name: table.values, f"{name}.values": table.values, f"{name}.scale": table.scale}
    slots = layout(tensors, packed.precision)
    head = header(slots, METADATA)
    crc = zlib.crc32(head)
    with open(folder / TENSORS, "wb") as file:
        file.write(head)
        for name in slots:
            data = np.ascontiguousarray(arrays[name]).reshape(-1).data
            file.write(data)
            crc = zlib.crc32(data, crc)
    size = (folder / TENSORS).stat().st_size
    if not compress:
        return TensorFile(size, f"crc32:{crc:08x}")
    compressed, encoder = _compress(folder, len(head), slots.values())
    if size > MAX_RATIO * compressed + MAX_SLACK:
        raise InputError(f"{packed.folder}: compresses over {MAX_RATIO} times, which readers refuse; do not compress")
    return TensorFile(size, f"crc32:{crc:08x}", compressed, encoder)


def _compress(folder: Path, head: int, slots: Iterable[Slot]) -> tuple[int, int]:
    """Replace the tensor file by one zstd frame; returns its bytes and those of the encoder's weights.

    Two settings are tried and the smaller result is kept. With a hash table of 64 entries zstd finds almost no matches
    and only entropy-codes the bytes. That is best for unstructured patterns, where encoding the accidental matches
    that higher levels find costs more than it saves. Block patterns do have useful matches.
    """
    from pruneofa.formats.zstd import CompressionParameter, ZstdCompressor

    kinds = itertools.groupby(slots, key=lambda slot: (slot.dtype, slot.encoder))
    parts = [(head, False), *((sum(slot.nbytes for slot in group), encoder) for (_, encoder), group in kinds)]
    results = []
    key = CompressionParameter
    for attempt, settings in enumerate(({key.compression_level: 1, key.hash_log: 6}, {key.compression_level: 3})):
        packer = ZstdCompressor(options={**settings, key.checksum_flag: 1})
        packer.set_pledged_input_size(sum(n for n, _ in parts))
        written = {True: 0, False: 0}
        target = folder / f"{attempt}.zst"
        with open(folder / TENSORS, "rb") as file, open(target, "wb") as out:
            for left, encoder in parts:
                while left:
                    data = file.read(min(left, _CHUNK))
                    left -= len(data)
                    written[encoder] += out.write(packer.compress(data))
                # End the block here, so that its entropy table covers one kind of bytes and its size is known.
                written[encoder] += out.write(packer.flush(packer.FLUSH_BLOCK))
            written[False] += out.write(packer.flush())
        results.append((sum(written.values()), written[True], target))
    (size, encoder, best), (*_, worse) = sorted(results)
    best.replace(folder / COMPRESSED)
    worse.unlink()
    (folder / TENSORS).unlink()
    return size, encoder
