"""Packed folders as `fuzz_packed` damages them: seeds, and faults of a byte, a field or a frame."""

import contextlib
import json
import re
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
import zstandard

from pruneofa.formats.layout import figures, header, layout
from pruneofa.formats.manifest import MANIFEST, METADATA, TENSORS, Tensor
from pruneofa.formats.packed import unpack_bits
from pruneofa.formats.pattern import packed_bits, pattern_hashes
from tests.broken import WRONG, paths, replaced
from tests.golden import GOLDEN, VARIANTS

LARGEST = 1 << 16  # bytes of an input
EXTRAS = ("tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json",
          "config_sentence_transformers.json", "1_Pooling/config.json")  # fmt: skip
NAMES = (MANIFEST, TENSORS, "config.json", *EXTRAS)  # the second as it lies on the disk, compressed or not
MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-45, 3e38, -1], "<f4")
LENGTHS = (0, 1, 2**16, 2**31 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
# What a mutation meets in a file that an earlier one broke.
NOTHING_THERE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError,
                 zstandard.ZstdError)  # fmt: skip

Files = dict[str, bytes]  # content by the names of NAMES; what is empty is not there
Blind = Callable[[bytes], bytes]


def pack(files: Files) -> bytes:
    """One string: each file behind its length."""
    return b"".join(len(files[name]).to_bytes(4, "little") + files[name] for name in NAMES)


def unpack(data: bytes) -> Files:
    """Of `pack`, or of any other bytes: what is missing is empty."""
    found = {}
    for name in NAMES:
        end = 4 + int.from_bytes(data[:4], "little")
        found[name], data = data[4:end], data[end:]
    return found


def seeds() -> list[Files]:
    """The golden folders, and each again as sentence-transformers would have it."""
    found = []
    for variant in VARIANTS:
        names = {name: GOLDEN / variant / name for name in NAMES}
        names[TENSORS] = next((GOLDEN / variant).glob(f"{TENSORS}*"))
        found.append({name: path.read_bytes() if path.is_file() else b"" for name, path in names.items()})
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in MODULES.items()]
    more = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        "sentence_bert_config.json": {"max_seq_length": 4, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"q": "good: "}, "default_prompt_name": "q"},
        "tokenizer_config.json": {"model_max_length": 6, "mask_token": "[MASK]", "model_input_names": ["input_ids"]},
    }
    sentences = {name: json.dumps(value).encode() for name, value in more.items()}
    return [*found, *(files | sentences for files in found)]


# Mutations


def mutate(files: Files, random: Random, blind: Blind) -> Files:
    """A folder with one to three faults, most often with figures that agree with what the fault made of it."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(*NOTHING_THERE):
            files = random.choice(MUTATIONS)(files, random, blind)
    if random.random() < 0.75:
        files = agree(files)
    return files


def _one(files: Files, random: Random, but: str = "") -> str:
    """A file that is there: one of the model's, or as often one that says how to use it."""
    of_model = [name for name in (MANIFEST, TENSORS, "config.json") if files[name] and name != but]
    return random.choice(random.choice([of_model, [name for name in EXTRAS if files[name]] or of_model]))


def _some_bytes(files: Files, random: Random, blind: Blind) -> Files:
    name = _one(files, random)
    return files | {name: blind(files[name])}


def _some_content(files: Files, random: Random, blind: Blind) -> Files:
    return files | {TENSORS: _stored(files, blind(_plain(files)))}


def _cut_or_continued(files: Files, random: Random, blind: Blind) -> Files:
    name = _one(files, random)
    whole = files[name]
    cut = whole[: random.randrange(len(whole))]
    return files | {name: random.choice((cut, whole + cut, whole + bytes(random.randrange(99))))}


def _changed(document: object, random: Random) -> object:
    """A JSON document with one field replaced, removed, nudged, or exchanged for another's value."""
    path = random.choice(list(paths(document)))
    value = document
    for key in path:
        value = value[key]
    kind = random.randrange(4)
    if type(value) in (int, float) and kind:
        near = (value + 1, value - 1, -value, 2 * value, value + 0.5, float(value), value * 2**32)
        return replaced(document, path, random.choice(near))
    if kind == 1:
        other = document
        for key in random.choice(list(paths(document))):
            other = other[key]
        return replaced(document, path, other)
    if kind == 2 and isinstance(value, (list, dict)) and value:
        more = [*value, *value] if isinstance(value, list) else value | {f"{random.choice(list(value))}x": 1}
        return replaced(document, path, more)
    return replaced(document, path, random.choice(WRONG))


def _a_field(files: Files, random: Random, blind: Blind) -> Files:
    name = _one(files, random, but=TENSORS)
    return files | {name: json.dumps(_changed(json.loads(files[name]), random)).encode()}


def _a_field_of_the_header(files: Files, random: Random, blind: Blind) -> Files:
    raw = _plain(files)
    start = 8 + int.from_bytes(raw[:8], "little")
    head = json.dumps(_changed(json.loads(raw[8:start]), random)).encode()
    return files | {TENSORS: _stored(files, len(head).to_bytes(8, "little") + head + raw[start:])}


def _the_length_of_the_header(files: Files, random: Random, blind: Blind) -> Files:
    raw = _plain(files)
    near = int.from_bytes(raw[:8], "little") + random.randrange(-9, 10)
    length = random.choice((*LENGTHS, near % 2**64))
    return files | {TENSORS: _stored(files, length.to_bytes(8, "little") + raw[8:])}


def _a_number(files: Files, random: Random, blind: Blind) -> Files:
    raw = bytearray(_plain(files))
    start = 8 + int.from_bytes(raw[:8], "little")
    place = random.randrange(start, len(raw) - 3)
    if random.random() < 0.5:
        place -= (place - start) % 4
        raw[place : place + 4] = random.choice(SPECIAL).tobytes()
    else:
        raw[place] = random.choice((0, 1, 127, 128, 129, 255))
    return files | {TENSORS: _stored(files, bytes(raw))}


def _another_frame(files: Files, random: Random, blind: Blind) -> Files:
    """The same content by another zstd setting, or with its header damaged; a plain file becomes a frame."""
    raw = _plain(files)
    sizes = {"write_content_size": random.random() < 0.8, "write_checksum": random.random() < 0.5}
    settings = zstandard.ZstdCompressionParameters.from_level(
        random.choice((-5, 1, 3)), window_log=random.choice((10, 17, 23, 24, 27)), **sizes
    )
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj(
        size=random.choice((len(raw), -1)) if sizes["write_content_size"] else -1
    )
    frame = bytearray(stream.compress(raw) + stream.flush())
    if random.random() < 0.5:
        frame[random.randrange(min(len(frame), 18))] ^= 1 << random.randrange(8)
    manifest = json.loads(files[MANIFEST]) | {"compression": "zstd"}
    return files | {MANIFEST: json.dumps(manifest).encode(), TENSORS: bytes(frame)}


def _other_shapes(files: Files, random: Random, blind: Blind) -> Files:
    """A tensor of another shape, and a file that agrees: only the engine can object."""
    manifest = json.loads(files[MANIFEST])
    raw = _plain(files)
    start = 8 + int.from_bytes(raw[:8], "little")
    old = {name: entry["data_offsets"] for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"}
    name = random.choice(list(manifest["tensors"]))
    if random.random() < 0.3:
        del manifest["tensors"][name]
        manifest["activations"].get("scales", {}).pop(name, None)
    else:
        shape = manifest["tensors"][name]["shape"]
        shape[random.randrange(len(shape))] = random.choice((1, 2, 3, 5, 8, 64, 65))
    slots = layout(_tensors(manifest), manifest["precision"])
    if sum(slot.nbytes for slot in slots.values()) > LARGEST:
        return files
    data = b""
    for stored, slot in slots.items():
        begin, end = old.get(stored, (0, 0))
        data += raw[start + begin : start + end][: slot.nbytes].ljust(slot.nbytes, b"\0")
    whole = header(slots, METADATA) + data
    return files | {MANIFEST: json.dumps(manifest).encode(), TENSORS: _stored(files, whole)}


def _a_static_scale(files: Files, random: Random, blind: Blind) -> Files:
    """Another scale or zero point of the layers that read the same input, of any size or kind."""
    manifest = json.loads(files[MANIFEST])
    linears = [name for name, entry in manifest["tensors"].items() if entry["kind"] == "linear"]
    scales = manifest["activations"].setdefault("scales", {name: [1.0, 0] for name in linears})
    manifest["activations"]["kind"] = "static"
    chosen = re.sub("query|key|value", "(query|key|value)", random.choice(list(scales)))
    pair = [random.choice((2.0**-126, 2.0**119, 1e-40, 0.1, 0.5, *WRONG)), random.choice((0, 255, 256, *WRONG))]
    scales |= {name: pair for name in scales if re.fullmatch(chosen, name)}
    return files | {MANIFEST: json.dumps(manifest).encode()}


MUTATIONS = (
    _some_bytes,
    _some_content,
    _cut_or_continued,
    _a_field,
    _a_field,
    _a_field_of_the_header,
    _the_length_of_the_header,
    _a_number,
    _a_number,
    _a_static_scale,
    _another_frame,
    _other_shapes,
)


def is_frame(raw: bytes) -> bool:
    return raw.startswith(zstandard.MAGIC_NUMBER.to_bytes(4, "little"))


def _plain(files: Files) -> bytes:
    """The tensor file before compression, or its first MiB."""
    if not is_frame(files[TENSORS]):
        return files[TENSORS]
    return zstandard.ZstdDecompressor().stream_reader(files[TENSORS]).read(1 << 20)


def _stored(files: Files, raw: bytes) -> bytes:
    return zstandard.compress(raw) if is_frame(files[TENSORS]) else raw


def agree(files: Files) -> Files:
    """The same with sizes, checksum, figures and hashes in the manifest that are those of the tensor file."""
    with contextlib.suppress(*NOTHING_THERE):
        return files | {MANIFEST: json.dumps(_agreeing(files)).encode()}
    return files


def _agreeing(files: Files) -> dict[str, object]:
    manifest = json.loads(files[MANIFEST])
    sizes = manifest["sizes"]
    sizes["file"] = len(files[TENSORS])
    if manifest["compression"]:
        sizes["compressed"] = len(files[TENSORS])
        sizes.setdefault("compressed_encoder", 0)
        sizes["file"] = zstandard.frame_content_size(files[TENSORS])
    computed = figures(_tensors(manifest), manifest["precision"])
    if manifest["compression"]:
        share = sizes["compressed_encoder"] / computed["encoder"]
        computed["compressed_bits_per_weight"] = share * computed["bits_per_weight"]
    manifest["sparsity"] = computed.pop("sparsity")
    sizes |= computed
    with contextlib.suppress(*NOTHING_THERE):
        raw = _plain(files)
        manifest["checksum"] = f"crc32:{zlib.crc32(raw):08x}"
        manifest["pattern_hash"], manifest["pooler_hash"] = _hashes(manifest["tensors"], raw)
    return manifest


def _hashes(tensors: dict[str, dict], raw: bytes) -> tuple[str, str | None]:
    start = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:start])
    linears = {}
    for name in (name for name, entry in tensors.items() if entry["kind"] == "linear"):
        begin, end = head[f"{name}.bitmask"]["data_offsets"]
        rows, columns = tensors[name]["shape"]
        bits = np.frombuffer(raw[start + begin : start + end], np.uint8).reshape(rows, -(-columns // 8))
        linears[name] = (rows, columns), packed_bits(unpack_bits(bits, columns))
    return pattern_hashes((name, *linears[name]) for name in sorted(linears))


def _tensors(manifest: dict[str, object]) -> dict[str, Tensor]:
    return {name: Tensor(**entry) for name, entry in manifest["tensors"].items()}
