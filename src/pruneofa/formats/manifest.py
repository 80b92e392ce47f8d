"""manifest.json of a packed folder: every field checked, and what follows from it (FORMAT.md as code).

Name, dtype and shape of every stored tensor follow from the manifest alone (`layout`). So a reader knows how
many bytes there must be before it opens the tensor file, and allocates nothing the file does not hold.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pruneofa.errors import InputError, first_line, short
from pruneofa.families import (
    attention_input,
    base_modules,
    base_name,
    embedding_weights,
    is_encoder_weight,
    model_types,
    prefixes,
)
from pruneofa.formats.pattern import POOLER, position_bits

FORMAT = "pruneofa-packed"
VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "model.packed.safetensors"
COMPRESSED = f"{TENSORS}.zst"
METADATA = {"format": FORMAT, "version": str(VERSION)}
PRECISIONS = ("int8", "fp32")
SOURCE_DTYPES = ("F32", "F16", "BF16")
AGAIN = "copy or download the folder again, or make it again with pruneofa pack"

MAX_JSON = 4 << 20  # bytes; 24 layers need 0.1 MB
MAX_COLUMNS = 1 << 16  # 65536 products of 255 · 127 still fit the int32 sum of a kernel
MAX_RATIO, MAX_SLACK = 64, 1 << 20  # a compressed file may become this many times larger, and a MiB
MAX_WINDOW = 8 << 20  # bytes of history that a decompressor may be made to keep
LEAST_INPUT_SCALE = 2.0**-126  # of activations; 1 / scale is finite
MOST_INPUT_SCALE = 2.0**119  # 255 * scale is finite

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}")
_CHECKSUM = re.compile(r"crc32:[0-9a-f]{8}")
_PATTERN = re.compile(r"unstructured|4x1|1x4|([1-9]\d?):([1-9]\d?)", re.ASCII)
_OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}  # in the order of a file: what is larger first
_KEYS = (
    "format", "version", "precision", "architecture", "prefix", "pattern_hash", "pooler_hash", "sparsity", "tensors",
    "source", "activations", "sizes", "compression", "checksum", "pruneofa",
)  # fmt: skip
_ENTRY_KEYS = {
    "linear": ("shape", "kind", "dtype", "nonzeros", "pattern"),
    "embedding": ("shape", "kind", "dtype"),
    "plain": ("shape", "kind", "dtype"),
    "tied": ("shape", "kind", "dtype", "to"),
}
_SIZES = ("file", "encoder", "bits_per_weight", "entropy_bound")
_COMPRESSED_SIZES = ("compressed", "compressed_encoder", "compressed_bits_per_weight")


class Slot(NamedTuple):
    """A tensor of the file: dtype name of safetensors, shape, and whether it counts as the encoder's weights."""

    dtype: str
    shape: tuple[int, ...]
    encoder: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, as a Python int that cannot overflow."""
        return _BYTES[self.dtype] * math.prod(self.shape)


def canonical_name(name: str) -> str:
    """`pattern.base_name`, and today's names for the LayerNorm gamma and beta of old checkpoints."""
    name = base_name(name)
    for old, new in _OLD_NORM.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def source_name(name: str, entry: Mapping[str, Any], prefix: str) -> str:
    """The name a tensor had in the source: `stored_as` where the rule of prefixes does not give it."""
    return entry.get("stored_as") or (prefix + name if name.split(".")[0] in base_modules() else name)


def kind_of(name: str, ndim: int) -> str:
    """How a tensor of this canonical name is stored: "linear", "embedding" or "plain"."""
    if ndim == 2 and (name == POOLER or is_encoder_weight(name, ndim)):
        return "linear"
    return "embedding" if ndim == 2 and name in embedding_weights() else "plain"


def layout(tensors: Mapping[str, Mapping[str, Any]], precision: str, where: str = MANIFEST) -> dict[str, Slot]:
    """Every tensor of the file in its order: float32, int8, bits; in each the encoder's first; then by name.

    Equal things lie together, so that a compressor finds one kind of byte at a time. Raises InputError, which
    begins with `where`, when two would have the same name.
    """
    slots: dict[str, Slot] = {}
    for name, entry in tensors.items():
        for stored, slot in _slots(name, entry, precision):
            if stored in slots:
                raise InputError(f"{where}: two tensors would both be stored as {stored}; {AGAIN}")
            slots[stored] = slot
    return in_order(slots)


def in_order(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """By dtype, then the encoder's first, then by name; so every offset is a multiple of the size of the dtype."""
    ranks = list(_BYTES)
    return dict(sorted(slots.items(), key=lambda item: (ranks.index(item[1].dtype), not item[1].encoder, item[0])))


def _slots(name: str, entry: Mapping[str, Any], precision: str) -> Iterator[tuple[str, Slot]]:
    kind, shape, int8 = entry["kind"], tuple(entry["shape"]), precision == "int8"
    encoder = kind == "linear" and name != POOLER
    if kind == "linear":
        bits = Slot("U8", (shape[0], math.ceil(shape[1] / 8)), encoder)
        yield f"{name}.bitmask", bits
        yield f"{name}.values", Slot("I8" if int8 else "F32", (entry["nonzeros"],), encoder)
        if "negative_zeros" in entry:
            yield f"{name}.negative_zeros", bits
    elif kind == "embedding" and int8:
        yield f"{name}.values", Slot("I8", shape)
    elif kind != "tied":
        yield name, Slot("F32", shape)
    if int8 and kind in ("linear", "embedding"):
        yield f"{name}.scale", Slot("F32", shape[:1], encoder)


def header(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file: length of the header, and the header up to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, slot in slots.items():
        start, end = end, end + slot.nbytes
        entries[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def figures(tensors: Mapping[str, Mapping[str, Any]], precision: str) -> dict[str, float]:
    """The numbers of the encoder's weights: "sparsity", "encoder" (bytes), "bits_per_weight", "entropy_bound".

    The bound is 8 or 32 bits per non-zero and the least bits that say where they are, in bits per weight.
    """
    linears = [entry for name, entry in tensors.items() if entry["kind"] == "linear" and name != POOLER]
    weights = sum(math.prod(entry["shape"]) for entry in linears)
    nonzeros = sum(entry["nonzeros"] for entry in linears)
    stored = sum(slot.nbytes for slot in layout(tensors, precision).values() if slot.encoder)
    bound = (8 if precision == "int8" else 32) * nonzeros
    for entry in linears:
        size = math.prod(entry["shape"])
        bound += position_bits(size, 1 - entry["nonzeros"] / size)
    return {
        "sparsity": 1 - nonzeros / weights,
        "encoder": stored,
        "bits_per_weight": 8 * stored / weights,
        "entropy_bound": bound / weights,
    }


def check_inputs(inputs: Mapping[str, tuple[float, int]]) -> None:
    """Check static activations: (scale, zero point) of the input of each linear layer by its canonical NAME.

    Raises:
        InputError: a scale that no living layer gives, a zero point that is no code, or a query, key and value, which
            read the same input, that differ; it names the layer.
    """
    seen: dict[str, tuple[str, tuple[float, int]]] = {}
    for name, (scale, zero) in sorted(inputs.items()):
        good = type(scale) is float and LEAST_INPUT_SCALE <= scale <= MOST_INPUT_SCALE
        if not good or struct.unpack("f", struct.pack("f", scale))[0] != scale:
            raise InputError(
                f"input scale of {name} is {short(scale)}: dead activations, or calibrated on nothing; wanted a "
                f"float32 from {LEAST_INPUT_SCALE:.1e} to {MOST_INPUT_SCALE:.1e}; look at what that layer reads"
            )
        if not is_count(zero) or zero > 255:
            raise InputError(f"input zero point of {name} is {short(zero)}; wanted an integer from 0 to 255")
        if shared := attention_input(name):
            first, same = seen.setdefault(shared, (name, (scale, zero)))
            if same != (scale, zero):
                raise InputError(
                    f"{name} and {first} read the same input but have input scale and zero point {[scale, zero]} and "
                    f"{list(same)}"
                )


def tensor_file(manifest: Mapping[str, Any]) -> str:
    """Name of the file that holds the tensors."""
    return COMPRESSED if manifest["compression"] else TENSORS


def is_packed(folder: Path) -> bool:
    """Whether the folder looks like a packed one."""
    return (folder / MANIFEST).is_file() and any((folder / name).is_file() for name in (TENSORS, COMPRESSED))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed folder, every field checked against the others.

    Raises InputError naming the field.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST}, so not a packed folder; make one with: pruneofa pack {folder} OUT")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f'{path}: wanted "format": "{FORMAT}"; this is the manifest of something else')
    if type(version := manifest.get("version")) is not int or version != VERSION:
        raise InputError(f"{path}: format version {short(version)}; this pruneofa reads {VERSION}: upgrade it")
    check_manifest(manifest, str(path))
    return manifest


def read_config(folder: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a folder of a supported architecture, the same that the manifest was made from."""
    path = folder / "config.json"
    config = read_json(path)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in model_types():
        raise InputError(f"{path}: model_type is {short(model_type)}; wanted one of {', '.join(model_types())}")
    if manifest is not None and (named := architecture(config, path)) != manifest["architecture"]:
        raise InputError(
            f"{path}: architecture {named}, but {manifest['architecture']} in {MANIFEST}: files of two models; {AGAIN}"
        )
    return config


def architecture(config: Mapping[str, Any], path: Path) -> str | None:
    """The model class that a config names, or None."""
    named = config.get("architectures") or [None]
    if not isinstance(named, list) or not (named[0] is None or _is_name(named[0])):
        raise InputError(f"{path}: architectures is {short(named)}; wanted a list of class names")
    return named[0]


def read_json(path: Path, advice: str = AGAIN) -> Any:
    """A JSON file of at most MAX_JSON bytes. Raises InputError, which ends with the advice, for anything else."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, MAX_JSON + 1))  # read(n) takes n bytes of memory, however small the file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    if len(raw) > MAX_JSON:
        raise InputError(f"{path}: larger than {MAX_JSON} bytes; {advice}")
    return parse_json(raw, str(path), advice)


def parse_json(raw: bytes, where: str, advice: str = AGAIN) -> Any:
    """JSON as the standard has it: UTF-8, no key twice (readers would differ), no NaN. Raises InputError."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: a million brackets
        raise InputError(f"{where}: not valid JSON ({first_line(error)}); {advice}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def is_count(value: Any) -> bool:
    """Whether a JSON value is a non-negative integer; true and 1.0, which Python takes for 1, are not."""
    return type(value) is int and value >= 0


def check_manifest(manifest: dict[str, Any], where: str) -> None:
    """Raise InputError, with the name of the field, for what FORMAT.md does not allow."""
    _keys(manifest, where, _KEYS, optional=("quantized",))

    def want(key: str, good: bool, wanted: str) -> None:
        _want(good, f"{where}: {key}", manifest[key], wanted)

    want("precision", manifest["precision"] in PRECISIONS, "int8 or fp32")
    named = manifest["architecture"]
    want("architecture", named is None or _is_name(named), "a class name or null")
    prefix = manifest["prefix"]
    want("prefix", isinstance(prefix, str) and _is_prefix(prefix), f'such as "{prefixes()[0]}." or ""')
    want("compression", manifest["compression"] in (None, "zstd"), '"zstd" or null')
    checksum = manifest["checksum"]
    good = isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum) is not None
    want("checksum", good, "crc32: and 8 digits")
    want("pruneofa", isinstance(manifest["pruneofa"], str), "a version")
    for key in ("pattern_hash", "source"):
        want(key, _is_hash(manifest[key]), "64 hexadecimal digits")
    tensors = manifest["tensors"]
    want("tensors", isinstance(tensors, dict), "an object")
    for name, entry in tensors.items():
        _check_entry(name, entry, tensors, manifest["precision"], where)
    if not any(entry["kind"] == "linear" and name != POOLER for name, entry in tensors.items()):
        raise InputError(f"{where}: no linear weight of an encoder in it; {AGAIN}")
    _check_activations(manifest, where)
    if "quantized" in manifest:
        good = manifest["quantized"] is True and manifest["precision"] == "int8"
        good = good and manifest["activations"] == {"kind": "dynamic"}
        want("quantized", good, "true, of int8 with dynamic activations, or nothing")
    pooler = manifest["pooler_hash"]
    if POOLER in tensors:
        want("pooler_hash", _is_hash(pooler), f"64 hexadecimal digits, as there is {POOLER}")
    else:
        want("pooler_hash", pooler is None, f"null, as there is no {POOLER}")
    _check_sizes(manifest, where)


def _check_activations(manifest: dict[str, Any], where: str) -> None:
    """Dynamic; or static, with the scale and zero point of every linear of an int8 model and of nothing else."""
    activations, where = manifest["activations"], f"{where}: activations"
    if activations == {"kind": "dynamic"}:
        return
    static = isinstance(activations, dict) and activations.get("kind") == "static" and manifest["precision"] == "int8"
    _want(static, where, activations, '{"kind": "dynamic"} or, of int8, {"kind": "static", "scales": ...}')
    _keys(activations, where, ("kind", "scales"))
    scales = activations["scales"]
    _want(isinstance(scales, dict), f"{where}: scales", scales, "an object")
    linears = {name for name, entry in manifest["tensors"].items() if entry["kind"] == "linear"}
    if names := sorted(linears ^ scales.keys()):
        fault = "no scale of" if names[0] in linears else "a scale of"
        raise InputError(f"{where}: {fault} {short(names[0])}; wanted one of every linear weight; {AGAIN}")
    for name, pair in scales.items():
        _want(isinstance(pair, list) and len(pair) == 2, f"{where}: {name}", pair, "[scale, zero point]")
    try:
        check_inputs({name: tuple(pair) for name, pair in scales.items()})
    except InputError as error:
        raise InputError(f"{where}: {error}; {AGAIN}") from None


def _check_entry(name: str, entry: Any, tensors: dict[str, Any], precision: str, where: str) -> None:
    _want(_is_name(name) and canonical_name(name) == name, f"{where}: a tensor", name, "a name without prefix")
    where = f"{where}: tensor {name}"
    _want(isinstance(entry, dict), where, entry, "an object")
    kind = entry.get("kind")
    _want(isinstance(kind, str) and kind in _ENTRY_KEYS, f"{where}: kind", kind, f"one of {', '.join(_ENTRY_KEYS)}")
    optional = ("stored_as", "negative_zeros") if kind == "linear" and precision == "fp32" else ("stored_as",)
    _keys(entry, where, _ENTRY_KEYS[kind], optional)
    shape = entry["shape"]
    good = isinstance(shape, list) and len(shape) <= 8 and all(is_count(size) and 0 < size < 2**31 for size in shape)
    _want(good, f"{where}: shape", shape, "at most 8 positive integers below 2^31")
    expected = kind_of(name, len(shape))
    _want(kind == expected or (kind, expected) == ("tied", "plain"), f"{where}: kind", kind, expected)
    _want(entry["dtype"] in SOURCE_DTYPES, f"{where}: dtype", entry["dtype"], f"one of {', '.join(SOURCE_DTYPES)}")
    if "stored_as" in entry:
        stored = entry["stored_as"]
        _want(_is_name(stored) and canonical_name(stored) == name, f"{where}: stored_as", stored, f"a name of {name}")
    if kind == "linear":
        _check_linear(entry, where)
    if kind == "tied":
        to = tensors.get(entry["to"]) if isinstance(entry["to"], str) else None
        alike = ("embedding", shape, entry["dtype"])
        same = isinstance(to, dict) and (to.get("kind"), to.get("shape"), to.get("dtype")) == alike
        _want(same, f"{where}: to", entry["to"], "an embedding of the same shape and dtype")


def _check_linear(entry: dict[str, Any], where: str) -> None:
    rows, columns = entry["shape"]
    _want(columns <= MAX_COLUMNS, f"{where}: shape", entry["shape"], f"at most {MAX_COLUMNS} columns")
    nonzeros, pattern = entry["nonzeros"], entry["pattern"]
    _want(is_count(nonzeros) and nonzeros <= rows * columns, f"{where}: nonzeros", nonzeros, f"0 to {rows * columns}")
    if "negative_zeros" in entry:
        count, zeros = entry["negative_zeros"], rows * columns - nonzeros
        _want(is_count(count) and 0 < count <= zeros, f"{where}: negative_zeros", count, f"1 to {zeros}")
    match = _PATTERN.fullmatch(pattern) if isinstance(pattern, str) else None
    good = match is not None and (match[1] is None or int(match[1]) < int(match[2]))
    _want(good, f"{where}: pattern", pattern, "unstructured, 4x1, 1x4 or n:m")


def _check_sizes(manifest: dict[str, Any], where: str) -> None:
    sizes, compressed = manifest["sizes"], manifest["compression"] is not None
    _want(isinstance(sizes, dict), f"{where}: sizes", sizes, "an object")
    _keys(sizes, f"{where}: sizes", _SIZES + (_COMPRESSED_SIZES if compressed else ()))
    slots = layout(manifest["tensors"], manifest["precision"], where)
    data = sum(slot.nbytes for slot in slots.values())
    computed = figures(manifest["tensors"], manifest["precision"])
    file = sizes["file"]
    good = is_count(file) and data + 8 < file <= data + 8 + MAX_JSON
    _want(good, f"{where}: sizes: file", file, f"{data} bytes of tensors and a header")
    if compressed:
        packed, encoder = sizes["compressed"], sizes["compressed_encoder"]
        _want(is_count(packed) and packed > 0, f"{where}: sizes: compressed", packed, "a number of bytes")
        good = is_count(encoder) and encoder <= packed
        _want(good, f"{where}: sizes: compressed_encoder", encoder, f"at most {packed} bytes")
        if file > MAX_RATIO * packed + MAX_SLACK:
            raise InputError(f"{where}: {packed} bytes would become {file}, over {MAX_RATIO} times as many; {AGAIN}")
        computed["compressed_bits_per_weight"] = encoder / computed["encoder"] * computed["bits_per_weight"]
    for key, value in computed.items():
        stated = manifest[key] if key == "sparsity" else sizes[key]
        # 2**63: Python cannot subtract a float from an integer of a thousand digits.
        good = type(stated) in (int, float) and 0 <= stated < 2**63 and abs(stated - value) <= 1e-9 + 1e-6 * value
        _want(good, f"{where}: {key if key == 'sparsity' else f'sizes: {key}'}", stated, f"{value}, by the tensors")


def _keys(found: Mapping[str, Any], where: str, wanted: Iterable[str], optional: Iterable[str] = ()) -> None:
    for key in wanted:
        if key not in found:
            raise InputError(f"{where}: no {key} in it; {AGAIN}")
    for key in found:
        if key not in wanted and key not in optional:
            raise InputError(f"{where}: {short(key)} is unknown to format version {VERSION}; {AGAIN}")


def _want(good: object, where: str, got: Any, wanted: str) -> None:
    if not good:
        raise InputError(f"{where} is {short(got)}; wanted {wanted}; {AGAIN}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_prefix(value: str) -> bool:
    return value == "" or (_is_name(value) and base_name(f"{value}encoder") == "encoder")
