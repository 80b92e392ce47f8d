"""Read manifest.json into a `Manifest`; every field is checked against FORMAT.md and for consistency."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pruneofa import families
from pruneofa.errors import InputError, short
from pruneofa.families import POOLER_WEIGHT, base_name, canonical_name
from pruneofa.formats.files import MAX_JSON, is_there, read_json
from pruneofa.formats.layout import figures, layout
from pruneofa.formats.manifest import (
    AGAIN,
    FORMAT,
    MANIFEST,
    MAX_COLUMNS,
    MAX_RATIO,
    MAX_SLACK,
    PRECISIONS,
    SOURCE_DTYPES,
    VERSION,
    InputScales,
    Manifest,
    Sizes,
    Tensor,
    check_inputs,
    is_count,
    is_name,
    kind_of,
)
from pruneofa.formats.pattern import BLOCKS, ratio_of

_HASH = re.compile(r"[0-9a-f]{64}")
_CHECKSUM = re.compile(r"crc32:[0-9a-f]{8}")
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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed folder. Raises InputError as `parse_manifest` does, and if there is none."""
    path = folder / MANIFEST
    if not is_there(path):
        raise InputError(f"{folder}: no {MANIFEST}, so not a packed folder; make one with: pruneofa pack {folder} OUT")
    return parse_manifest(read_json(path, AGAIN), str(path))


def parse_manifest(manifest: dict[str, Any], where: str) -> Manifest:
    """The JSON object of manifest.json as a `Manifest`.

    Raises InputError, naming the field, for values that FORMAT.md does not allow or that contradict each other.
    """
    if manifest.get("format") != FORMAT:
        raise InputError(f'{where}: format is {short(manifest.get("format"))}; wanted "{FORMAT}"; give a packed folder')
    if type(version := manifest.get("version")) is not int or version != VERSION:
        raise InputError(f"{where}: format version {short(version)}; wanted {VERSION}; upgrade pruneofa")
    _keys(manifest, where, _KEYS, optional=("quantized",))

    def want(key: str, good: bool, wanted: str) -> None:
        _want(good, f"{where}: {key}", manifest[key], wanted)

    want("precision", manifest["precision"] in PRECISIONS, "int8 or fp32")
    named = manifest["architecture"]
    want("architecture", named is None or is_name(named), "a class name or null")
    prefix = manifest["prefix"]
    want("prefix", isinstance(prefix, str) and _is_prefix(prefix), f'such as "{families.prefixes()[0]}." or ""')
    want("compression", manifest["compression"] in (None, "zstd"), '"zstd" or null')
    checksum = manifest["checksum"]
    good = isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum) is not None
    want("checksum", good, "crc32: and 8 digits")
    want("pruneofa", isinstance(manifest["pruneofa"], str), "a version")
    for key in ("pattern_hash", "source"):
        want(key, _is_hash(manifest[key]), "64 hexadecimal digits")
    want("tensors", isinstance(manifest["tensors"], dict), "an object")
    for name, entry in manifest["tensors"].items():
        _check_entry(name, entry, manifest["tensors"], manifest["precision"], where)
    tensors = {name: Tensor(**entry | {"shape": tuple(entry["shape"])}) for name, entry in manifest["tensors"].items()}
    if not any(tensor.kind == "linear" and name != POOLER_WEIGHT for name, tensor in tensors.items()):
        raise InputError(f"{where}: no linear weight of an encoder in it; {AGAIN}")
    linears = {name for name, tensor in tensors.items() if tensor.kind == "linear"}
    input_scales = _input_scales(manifest["activations"], linears, manifest["precision"], f"{where}: activations")
    if "quantized" in manifest:
        good = manifest["quantized"] is True and manifest["precision"] == "int8"
        good = good and input_scales is None
        want("quantized", good, "true, only for int8 with dynamic activations")
    pooler = manifest["pooler_hash"]
    if POOLER_WEIGHT in tensors:
        want("pooler_hash", _is_hash(pooler), f"64 hexadecimal digits, as there is {POOLER_WEIGHT}")
    else:
        want("pooler_hash", pooler is None, f"null, as there is no {POOLER_WEIGHT}")
    _check_sizes(manifest, tensors, where)
    read_as = {"input_scales": input_scales, "quantized": "quantized" in manifest, "tensors": tensors}
    same = {field.name: manifest[field.name] for field in fields(Manifest) if field.name not in (*read_as, "sizes")}
    return Manifest(**same, **read_as, sizes=Sizes(**manifest["sizes"]))


def _input_scales(activations: Any, linears: set[str], precision: str, where: str) -> InputScales | None:
    """The scales of static activations (int8 only), exactly one for each linear; None if dynamic."""
    if activations == {"kind": "dynamic"}:
        return None
    static = isinstance(activations, dict) and activations.get("kind") == "static" and precision == "int8"
    _want(static, where, activations, '{"kind": "dynamic"} or, for int8, {"kind": "static", "scales": ...}')
    _keys(activations, where, ("kind", "scales"))
    scales = activations["scales"]
    _want(isinstance(scales, dict), f"{where}: scales", scales, "an object")
    if names := sorted(linears ^ scales.keys()):
        fault = "no scale for" if names[0] in linears else "a scale for"
        raise InputError(f"{where}: {fault} {short(names[0])}; wanted one for every linear weight; {AGAIN}")
    for name, pair in scales.items():
        _want(isinstance(pair, list) and len(pair) == 2, f"{where}: {name}", pair, "[scale, zero point]")
    found = {name: (pair[0], pair[1]) for name, pair in scales.items()}
    try:
        check_inputs(found)
    except InputError as error:
        raise InputError(f"{where}: {error}; {AGAIN}") from None
    return found


def _check_entry(name: str, entry: Any, tensors: dict[str, Any], precision: str, where: str) -> None:
    _want(is_name(name) and canonical_name(name) == name, f"{where}: a tensor", name, "a name without prefix")
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
        _want(is_name(stored) and canonical_name(stored) == name, f"{where}: stored_as", stored, f"a name of {name}")
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
    good = isinstance(pattern, str) and (pattern in BLOCKS or ratio_of(pattern) is not None)
    _want(good, f"{where}: pattern", pattern, "unstructured, 4x1, 1x4 or n:m")


def _check_sizes(manifest: dict[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    sizes, compressed = manifest["sizes"], manifest["compression"] is not None
    _want(isinstance(sizes, dict), f"{where}: sizes", sizes, "an object")
    _keys(sizes, f"{where}: sizes", _SIZES + (_COMPRESSED_SIZES if compressed else ()))
    slots = layout(tensors, manifest["precision"], where)
    data = sum(slot.nbytes for slot in slots.values())
    computed = figures(tensors, manifest["precision"])
    file = sizes["file"]
    good = is_count(file) and data + 8 < file <= data + 8 + MAX_JSON
    _want(good, f"{where}: sizes: file", file, f"{data} bytes of tensors and a header")
    if compressed:
        packed, encoder = sizes["compressed"], sizes["compressed_encoder"]
        # Below 2**63 also here: greater integers, of which the encoder's is divided below, are no floats.
        _want(is_count(packed) and 0 < packed < 2**63, f"{where}: sizes: compressed", packed, "a number of bytes")
        good = is_count(encoder) and encoder <= packed
        _want(good, f"{where}: sizes: compressed_encoder", encoder, f"at most {packed} bytes")
        if file > MAX_RATIO * packed + MAX_SLACK:
            raise InputError(f"{where}: {packed} bytes decompress to {file}, over {MAX_RATIO} times as many; {AGAIN}")
        computed["compressed_bits_per_weight"] = encoder / computed["encoder"] * computed["bits_per_weight"]
    for key, value in computed.items():
        stated = manifest[key] if key == "sparsity" else sizes[key]
        # 2**63: Python cannot subtract a float from an integer of a thousand digits.
        good = type(stated) in (int, float) and 0 <= stated < 2**63 and abs(stated - value) <= 1e-9 + 1e-6 * value
        _want(good, f"{where}: {key if key == 'sparsity' else f'sizes: {key}'}", stated, f"{value}, from the tensors")


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


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_prefix(value: str) -> bool:
    return value == "" or (is_name(value) and base_name(f"{value}encoder") == "encoder")
