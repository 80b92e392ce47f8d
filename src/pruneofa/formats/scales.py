"""The int8 scales of a Hugging Face folder: quantization.json and .safetensors beside its weights. No torch.

The folder's float32 weights are exactly code * scale, so `codes` recovers the int8 codes from them. FORMAT.md,
"Scales in a Hugging Face folder", is the definition.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from pruneofa.errors import InputError, short
from pruneofa.families import canonical_name
from pruneofa.formats.files import is_there, new_file, read_json, write_json
from pruneofa.formats.manifest import check_inputs, kind_of
from pruneofa.formats.packed import MAX_SCALE
from pruneofa.formats.tensors import read_tensor, tensors_of, weight_files

SETTINGS, SCALES = "quantization.json", "quantization.safetensors"
FORMAT, VERSION = "pruneofa-quantization", 1

_HASH = re.compile(r"[0-9a-f]{64}")
_HASHES = ("pattern_hash", "pooler_hash")
_AGAIN = "quantize the model again with: pruneofa quantize"


@dataclass(frozen=True)
class QuantizationArgs:
    """How one kind of tensor is quantized, with the fields of compressed-tensors' QuantizationArgs.

    Attributes:
        strategy: the elements that share a scale: "channel" (an output row) or "tensor" for weights and embedding
            tables, "token" or "tensor" for activations.
        symmetric: whether the zero point is always 0.
        dynamic: whether scales are computed for every input at run time.
        num_bits: bits of a code.
        type: type of a code.
    """

    strategy: str
    symmetric: bool
    dynamic: bool = False
    num_bits: int = 8
    type: str = "int"


_WEIGHTS = (QuantizationArgs("channel", True), QuantizationArgs("tensor", True))
_ACTIVATIONS = (QuantizationArgs("token", False, dynamic=True), QuantizationArgs("tensor", False))
_EMBEDDINGS = (QuantizationArgs("channel", True), None)


@dataclass(frozen=True, eq=False)
class Quantization:
    """Scales of a model's weights and, if static, of its activations.

    NAME is the canonical name of a weight (FORMAT.md), the same in all three dictionaries, such as
    "encoder.layer.0.output.dense.weight" or "pooler.dense.weight".

    Attributes:
        weights: the weights of the linear layers; codes are -127..127 for strategy "channel", -128..127 for "tensor".
        input_activations: the uint8 inputs of the linear layers: per token and dynamic, or per tensor and static.
        embeddings: the three embedding tables, per row; None if they stay float.
        weight_scale: {NAME: float32 (rows,)} of linears and quantized tables; with strategy "tensor" all rows equal.
        input_scale: {NAME of a linear: scale}, each exactly representable in float32; empty if dynamic.
        input_zero_point: {NAME: 0..255}, with the names of `input_scale`.
        pattern_hash: `pattern.pattern_hash` of the encoder when the folder was written, to detect later changes of
            the pattern; None if unknown.
        pooler_hash: the same for the pooler, whose zeros are locked too; None if unknown, or without a pooler.

    Raises:
        InputError: naming the layer, if the parts contradict each other or a scale or zero point is out of range.
    """

    weights: QuantizationArgs
    input_activations: QuantizationArgs
    embeddings: QuantizationArgs | None
    weight_scale: dict[str, np.ndarray]
    input_scale: dict[str, float]
    input_zero_point: dict[str, int]
    pattern_hash: str | None = None
    pooler_hash: str | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS), ("embeddings", _EMBEDDINGS)):
            if getattr(self, field) not in allowed:
                wanted = " or ".join(map(_shown, allowed))
                raise InputError(f"{field} is {_shown(getattr(self, field))}; wanted {wanted}; {_AGAIN}")
        for name, scale in self.weight_scale.items():
            self._check_weight(name, scale)
        linears = self.linears()
        if not linears:
            raise InputError(f"no weight scale of an encoder's linear layer; {_AGAIN}")
        inputs = set() if self.input_activations.dynamic else set(linears)
        for what, found in (("input scale", self.input_scale), ("input zero point", self.input_zero_point)):
            if names := sorted(inputs ^ set(found)):
                raise InputError(f"{'no' if names[0] in inputs else 'unexpected'} {what} of {names[0]}; {_AGAIN}")
        try:
            check_inputs(
                {name: (_plain(self.input_scale[name]), _plain(self.input_zero_point[name])) for name in inputs}
            )
        except InputError as error:
            raise InputError(f"{error}; {_AGAIN}") from None
        for field in _HASHES:
            if (value := getattr(self, field)) is not None and not _HASH.fullmatch(value):
                raise InputError(f"{field} is {short(value)}; wanted 64 hexadecimal digits; {_AGAIN}")

    @property
    def lowest(self) -> int:
        """The lowest code of a linear weight."""
        return -128 if self.weights.strategy == "tensor" else -127

    def linears(self) -> list[str]:
        """NAMEs of the linear weights, in order."""
        return sorted(name for name in self.weight_scale if kind_of(name, 2) == "linear")

    def _check_weight(self, name: str, scale: np.ndarray) -> None:
        kind = kind_of(name, 2)
        if canonical_name(name) != name or kind == "plain" or (kind == "embedding" and self.embeddings is None):
            raise InputError(f"a weight scale of {short(name)}, which is not quantized; {_AGAIN}")
        if scale.dtype != np.float32 or scale.ndim != 1 or not scale.size:
            raise InputError(f"weight scale of {name} is {scale.dtype} {scale.shape}; wanted float32 (rows,); {_AGAIN}")
        good = (scale > 0) & (scale <= MAX_SCALE)  # False for NaN
        if not good.all():
            row = int(np.argmin(good))
            raise InputError(f"weight scale of {name} is {scale[row]} in row {row}; wanted a number above 0; {_AGAIN}")
        if kind == "linear" and self.weights.strategy == "tensor" and (scale != scale[0]).any():
            raise InputError(f"weight scale of {name} differs from row to row; wanted one per tensor; {_AGAIN}")


def codes(name: str, weight: np.ndarray, scale: np.ndarray, lowest: int = -127) -> np.ndarray:
    """int8 codes (rows, columns) of a float32 weight that is exactly code * scale of its row, in float32.

    Args:
        name: name of the weight, for error messages.
        weight: float32 (rows, columns).
        scale: float32 (rows,).
        lowest: the lowest code.

    Raises:
        InputError: a weight is not exactly code * scale.
    """
    found = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        part, each = weight[rows], scale[rows, None]
        found[rows] = np.clip(np.rint(part / each), lowest, 127)
        if wrong := np.count_nonzero((found[rows] * each).view(np.uint32) != part.view(np.uint32)):
            raise InputError(
                f"{name} is not on the int8 grid: {wrong} of its weights are not an integer multiple of their scale in "
                f"{SCALES}; quantize the model again, or remove {SETTINGS} if the model was trained afterwards"
            )
    return found


_ROWS = 4096  # rows processed at a time, to limit memory: an embedding table has tens of thousands


def check_pattern(folder: Path, quantization: Quantization, pattern_hash: str, pooler_hash: str | None) -> None:
    """Raise InputError if a hash, computed from the folder's weights, differs from the one stored with the scales."""
    written = (("encoder", quantization.pattern_hash, pattern_hash), ("pooler", quantization.pooler_hash, pooler_hash))
    for part, wanted, found in written:
        if wanted not in (None, found):
            raise InputError(
                f"{folder}: the {part}'s sparsity pattern has hash {found}, but {wanted} in {SETTINGS}: its pattern "
                "lock was broken after quantization; quantize the locked model again"
            )


def is_quantized(folder: Path) -> bool:
    """Whether a Hugging Face folder has scales, that is, is quantized."""
    return is_there(folder / SETTINGS)


def read(folder: Path) -> Quantization | None:
    """The scales of a Hugging Face folder, checked against names and shapes of its weights; None if it has none.

    Raises:
        InputError: naming file and layer, if something is malformed or does not fit.
    """
    if not is_quantized(folder):
        return None
    path, where = folder / SETTINGS, folder / SCALES
    settings = read_json(path, _AGAIN)
    arguments = _arguments(settings, path)
    if not where.is_file():
        raise InputError(f"{folder}: {SETTINGS} is there, but {SCALES} is missing; copy it too, or {_AGAIN}")
    parts: dict[str, Any] = {part: {} for part in _PARTS}
    for key, stored in tensors_of(where):
        name, _, part = key.rpartition(".")
        dtype, scalar = _PARTS.get(part, (None, False))
        if dtype is None:
            raise InputError(
                f"{where}: {short(key)} is unknown; wanted LAYER. and one of {', '.join(_PARTS)}; {_AGAIN}"
            )
        if stored.dtype != dtype or (scalar and stored.shape != (1,)):
            wanted = f"{dtype} {'[1]' if scalar else '[rows]'}"
            raise InputError(f"{where}: {key} is {stored.dtype} {list(stored.shape)}; wanted {wanted}; {_AGAIN}")
        value = read_tensor(key, stored)
        parts[part][f"{name}.weight"] = value[0].item() if scalar else value
    try:
        found = Quantization(**arguments, **parts)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    _check_names(folder, found)
    return found


def write(folder: Path, quantization: Quantization) -> None:
    """Write both files into a folder, for `read`."""
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    for name, scale in quantization.weight_scale.items():
        arrays[f"{name}_scale"] = scale
    for name, scale in quantization.input_scale.items():
        layer = name.removesuffix(".weight")
        arrays[f"{layer}.input_scale"] = np.array([scale], np.float32)
        arrays[f"{layer}.input_zero_point"] = np.array([quantization.input_zero_point[name]], np.uint8)
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    with new_file(folder / SCALES) as temporary:
        save_file(arrays, temporary)
    settings: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    settings |= {field: getattr(quantization, field) for field in _HASHES}
    for field in ("weights", "input_activations", "embeddings"):
        args = getattr(quantization, field)
        settings[field] = None if args is None else dataclasses.asdict(args)
    write_json(folder / SETTINGS, settings)


# Names as in compressed-tensors, such as LAYER.weight_scale: (dtype, whether it is a scalar)
_PARTS = {"weight_scale": ("F32", False), "input_scale": ("F32", True), "input_zero_point": ("U8", True)}


def _arguments(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of quantization.json as arguments of `Quantization`."""
    if settings.get("format") != FORMAT:
        raise InputError(f'{path}: format is {short(settings.get("format"))}; wanted "{FORMAT}"; {_AGAIN}')
    if type(version := settings.get("version")) is not int or version != VERSION:
        raise InputError(f"{path}: version {short(version)}; wanted {VERSION}; upgrade pruneofa")
    _keys(settings, path, ("format", "version", "weights", "input_activations", "embeddings", *_HASHES))
    arguments: dict[str, Any] = {field: settings[field] for field in _HASHES}
    for field, value in arguments.items():
        if not isinstance(value, str | None):
            raise InputError(f"{path}: {field} is {short(value)}; wanted a string or null; {_AGAIN}")
    for field in ("weights", "input_activations", "embeddings"):
        value = settings[field]
        if value is None and field == "embeddings":
            arguments[field] = None
            continue
        if not isinstance(value, dict):
            raise InputError(f"{path}: {field} is {short(value)}; wanted an object; {_AGAIN}")
        fields = get_type_hints(QuantizationArgs)
        _keys(value, f"{path}: {field}", fields)
        for key, wanted in fields.items():
            if type(value[key]) is not wanted:
                raise InputError(f"{path}: {field}: {key} is {short(value[key])}; wanted {wanted.__name__}; {_AGAIN}")
        arguments[field] = QuantizationArgs(**value)
    return arguments


def _keys(found: Mapping[str, Any], where: Any, wanted: Any) -> None:
    for key in wanted:
        if key not in found:
            raise InputError(f"{where}: no {key} in it; {_AGAIN}")
    for key in found:
        if key not in wanted:
            raise InputError(f"{where}: {short(key)} is unknown; wanted only {', '.join(wanted)}; {_AGAIN}")


def _check_names(folder: Path, quantization: Quantization) -> None:
    """Raise InputError unless exactly the quantized weights have scales, one per row."""
    kinds = ("linear",) if quantization.embeddings is None else ("linear", "embedding")
    rows = {}
    for file in weight_files(folder):
        for stored_name, stored in tensors_of(file):
            name = canonical_name(stored_name)
            if kind_of(name, len(stored.shape)) in kinds:
                rows[name] = stored.shape[0]
    where = folder / SCALES
    for name in sorted(rows.keys() ^ quantization.weight_scale.keys()):
        if name in rows:
            raise InputError(f"{where}: no weight scale of {name}; {_AGAIN}")
        raise InputError(f"{where}: a weight scale of {name}, which the model does not have; {_AGAIN}")
    for name, scale in quantization.weight_scale.items():
        if len(scale) != rows[name]:
            raise InputError(f"{where}: {len(scale)} weight scales of {name}; wanted {rows[name]}, its rows; {_AGAIN}")


def _plain(value: Any) -> Any:
    """A NumPy number as a Python number."""
    return value.item() if isinstance(value, np.generic) else value


def _shown(args: Any) -> str:
    if not isinstance(args, QuantizationArgs):
        return short(args)
    kind = "dynamic" if args.dynamic else "static"
    signs = "symmetric" if args.symmetric else "asymmetric"
    return f"{short(args.type)}{short(args.num_bits)} per {short(args.strategy)} ({signs}, {kind})".replace("'", "")
