"""Packed folders cut short, with flipped bits, or that ask for memory: refused, with no more than they justify."""

import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard

from pruneofa.errors import InputError
from pruneofa.formats import manifest as manifest_module
from pruneofa.formats.files import MAX_JSON, read_json
from pruneofa.formats.layout import header, layout
from pruneofa.formats.manifest import COMPRESSED, MANIFEST, METADATA, TENSORS, Tensor
from pruneofa.formats.packed import read
from pruneofa.formats.zstd import window_size
from tests.broken import copy, parts, refused, state, write
from tests.golden import GOLDEN


@pytest.fixture(params=["v1-int8", "v1-fp32", "v1-int8-zstd"])
def folder(request, tmp_path):
    return copy(request.param, tmp_path)


@pytest.fixture
def zstd(tmp_path):
    return copy("v1-int8-zstd", tmp_path)


# Damaged files


def test_a_file_cut_short_or_continued(folder):
    file = next(folder / name for name in (TENSORS, COMPRESSED) if (folder / name).exists())
    whole = file.read_bytes()
    for length in [*range(20), *range(20, len(whole), 61), *range(len(whole) - 20, len(whole))]:
        file.write_bytes(whole[:length])
        assert f"{length} bytes; wanted {len(whole)}, as manifest.json states" in refused(folder)
    file.write_bytes(whole + b"\0")
    assert f"{len(whole) + 1} bytes; wanted {len(whole)}" in refused(folder)


def test_a_file_cut_short_that_the_manifest_agrees_with(fp32):
    whole = (fp32 / TENSORS).read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (fp32 / TENSORS).write_bytes(whole[:length])
        state(fp32, whole[:length])
        refused(fp32)


def flips(whole, step):
    """Copies with one bit flipped, a different one in each byte."""
    for place in range(0, len(whole), step):
        yield place, whole[:place] + bytes([whole[place] ^ 1 << (place // step % 8)]) + whole[place + 1 :]


@pytest.mark.parametrize(("variant", "step"), [("v1-int8", 11), ("v1-fp32", 11), ("v1-int8-zstd", 3)])
def test_any_bit_flipped_in_the_tensor_file_is_noticed(variant, step, tmp_path):
    folder = copy(variant, tmp_path)
    file = next(folder / name for name in (TENSORS, COMPRESSED) if (folder / name).exists())
    accepted = []
    for place, raw in flips(file.read_bytes(), step):
        file.write_bytes(raw)
        try:
            read(folder)
        except InputError as error:
            assert str(file) in str(error)
        else:
            accepted.append(place)
    # zstd: bits that no content depends on, such as the reserved one of the frame's header, are read around.
    assert len(accepted) <= (2 if variant.endswith("zstd") else 0)


@pytest.mark.parametrize(("variant", "step"), [("v1-int8", 17), ("v1-fp32", 17)])
def test_bits_flipped_by_someone_who_corrects_the_checksum(variant, step, tmp_path):
    folder = copy(variant, tmp_path)
    manifest = read_json(folder / MANIFEST)
    before = read(folder)
    for _, raw in flips((folder / TENSORS).read_bytes(), step):
        (folder / TENSORS).write_bytes(raw)
        write(folder, manifest | {"checksum": f"crc32:{zlib.crc32(raw):08x}"})
        try:
            after = read(folder)
        except InputError:
            continue
        for name, linear in before.linears.items():  # only values differ
            np.testing.assert_array_equal(after.linears[name].bitmask, linear.bitmask)
            assert after.linears[name].values.shape == linear.values.shape
            assert np.isfinite(after.linears[name].dense()).all()


def test_any_bit_flipped_in_the_manifest_is_noticed_or_changes_no_tensor(int8):
    file = int8 / MANIFEST
    before = read(int8)
    for _, raw in flips(file.read_bytes(), 13):
        file.write_bytes(raw)
        try:
            after = read(int8)
        except InputError:
            continue
        assert {n: a.tobytes() for n, a in after.plain.items()} == {n: a.tobytes() for n, a in before.plain.items()}
        for name, linear in before.linears.items():
            np.testing.assert_array_equal(after.linears[name].dense(), linear.dense())


# Memory, and compression


def small(folder):
    """Refused, and with no more memory than a file of a few kB justifies."""
    tracemalloc.start()
    try:
        message = refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    return message


def claims(folder, shape, file=None):
    """A manifest and a header that agree on a tensor the file does not hold."""
    manifest = read_json(folder / MANIFEST)
    manifest["tensors"]["classifier.weight"]["shape"] = shape
    slots = layout({n: Tensor(**e) for n, e in manifest["tensors"].items()}, manifest["precision"])
    head = header(slots, METADATA)
    size = len(head) + sum(slot.nbytes for slot in slots.values())
    manifest["sizes"]["file"] = file or size
    write(folder, manifest)
    (folder / TENSORS).write_bytes(head + parts(GOLDEN_INT8)[1])
    return size


GOLDEN_INT8 = GOLDEN / "v1-int8"


@pytest.mark.parametrize("shape", [[10**6, 10**6], [2**31 - 1] * 8])
def test_a_trillion_elements_are_refused_before_anything_is_allocated(shape, int8):
    size = claims(int8, shape)
    assert f"bytes; wanted {size}, as manifest.json states" in small(int8)
    claims(int8, shape, file=(int8 / TENSORS).stat().st_size)
    assert "sizes: file is" in small(int8)


def test_a_compressed_file_that_would_become_much_larger(zstd):
    manifest = read_json(zstd / MANIFEST)
    raw = bytes(2**23)
    frame = zstandard.compress(raw)
    (zstd / COMPRESSED).write_bytes(frame)
    manifest["tensors"]["classifier.weight"]["shape"] = [2**20, 2]
    slots = layout({n: Tensor(**e) for n, e in manifest["tensors"].items()}, "int8")
    size = len(header(slots, METADATA)) + sum(slot.nbytes for slot in slots.values())
    manifest["sizes"] |= {"file": size, "compressed": len(frame), "compressed_encoder": 0}
    manifest["sizes"] |= {"compressed_bits_per_weight": 0}
    write(zstd, manifest)
    assert f"{len(frame)} bytes decompress to {size}, over 64 times as many" in small(zstd)


def reframe(folder, frame):
    (folder / COMPRESSED).write_bytes(frame)
    manifest = read_json(folder / MANIFEST)
    encoder = manifest["sizes"]["compressed_encoder"]
    manifest["sizes"] |= {"compressed": len(frame)}
    assert encoder <= len(frame)
    write(folder, manifest)


def stored_frame(raw, window_log):
    """A zstd frame (RFC 8878) that states its size and a window, whatever the size, and holds one block as it is."""
    size = (len(raw) - 256).to_bytes(2, "little")
    block = (len(raw) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x40" + bytes([(window_log - 10) << 3]) + size + block + raw


def test_frames_that_are_not_what_the_manifest_says(zstd):
    raw = (GOLDEN_INT8 / TENSORS).read_bytes()
    reframe(zstd, zstandard.compress(raw + b"\0"))
    assert "decompresses to 4744 bytes with a window of 4744; wanted 4743" in small(zstd)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    reframe(zstd, unsized)
    assert "decompresses to an unknown number of bytes" in small(zstd)
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, write_content_size=True)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj(size=2**27 + 1)
    head = stream.compress(raw) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    reframe(zstd, head)
    assert "with a window of 134217728; wanted 4743 and at most 8388608" in small(zstd)
    reframe(zstd, stored_frame(raw, window_log=24))
    assert "decompresses to 4743 bytes with a window of 16777216; wanted 4743 and at most 8388608" in small(zstd)
    reframe(zstd, stored_frame(raw, window_log=23))
    assert read(zstd).linears
    reframe(zstd, zstandard.compress(raw)[:500])
    assert "not a complete zstd file" in small(zstd)
    reframe(zstd, b"not a frame" * 20)
    assert "not a complete zstd file" in small(zstd)
    reframe(zstd, zstandard.compress(raw, 19))
    assert read(zstd).linears  # any level will do


@pytest.mark.parametrize("log", [10, 17, 23, 27])
def test_the_window_is_that_of_the_header(log):
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=log, write_content_size=False)
    frame = zstandard.ZstdCompressor(compression_params=wide).compressobj().compress(bytes(2**20))
    whole = zstandard.compress(bytes(5000))
    for head in (frame, whole, stored_frame(b"x" * 300, log)):
        assert window_size(head) == zstandard.get_frame_parameters(head).window_size


def test_a_frame_that_lies_about_its_content(zstd):
    """The content size in the frame's header is a claim as well."""
    raw = (GOLDEN_INT8 / TENSORS).read_bytes()
    longer = bytearray(zstandard.compress(raw + bytes(256 * 16)))
    place = longer.index((len(raw) + 256 * 16 - 256).to_bytes(2, "little"), 0, 16)
    longer[place : place + 2] = (len(raw) - 256).to_bytes(2, "little")
    assert zstandard.frame_content_size(bytes(longer)) == len(raw)
    reframe(zstd, bytes(longer))
    assert any(fault in small(zstd) for fault in ("not a complete zstd file", "has data after"))


def test_the_limits_are_those_of_the_specification():
    text = (GOLDEN.parents[1] / "FORMAT.md").read_text(encoding="utf-8")
    assert "at most 4 MiB each" in text and MAX_JSON == 4 * 2**20
    assert "at most 65 535 columns" in text and manifest_module.MAX_COLUMNS == 65535
    assert manifest_module.MAX_COLUMNS * 255 * 128 < 2**31
    assert "at most 64 times as large unpacked, and 1 MiB; a window of at most 8 MiB" in text
    assert (manifest_module.MAX_RATIO, manifest_module.MAX_SLACK, manifest_module.MAX_WINDOW) == (64, 2**20, 2**23)
