"""The manifest of a packed folder as defined in FORMAT.md: its fields, and the names of tensors.

`manifest_reader` reads and checks the file; `layout` computes what follows from it.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pruneofa import families
from pruneofa.errors import InputError, short
from pruneofa.families import POOLER_WEIGHT, is_encoder_weight
from pruneofa.formats.files import is_there, read_json
from pruneofa.formats.sentence import with_activation
from pruneofa.formats.tensors import weight_files

FORMAT = "pruneofa-packed"
VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "model.packed.safetensors"
COMPRESSED = f"{TENSORS}.zst"
METADATA = {"format": FORMAT, "version": str(VERSION)}
PRECISIONS = ("int8", "fp32")
SOURCE_DTYPES = ("F32", "F16", "BF16")
WHOLE = "copy or download the folder again"
AGAIN = f"{WHOLE}, or make it again with pruneofa pack"

MAX_COLUMNS = (1 << 16) - 1  # of a kernel: as many products of 255 · 128 fit its int32 sum, and groups have 16 bits
MAX_RATIO, MAX_SLACK = 64, 1 << 20  # decompressed bytes <= MAX_RATIO * compressed bytes + MAX_SLACK
MAX_WINDOW = 8 << 20  # bytes: largest window that a decompressor may have to keep
MIN_INPUT_SCALE = 2.0**-126  # smallest scale of activations: 1 / scale is finite
MAX_INPUT_SCALE = 2.0**119  # largest scale of activations: 255 * scale is finite

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the packed model, with the fields of FORMAT.md; fields that its kind does not have are None.

    Attributes:
        shape: shape before packing.
        kind: linear, embedding, plain or tied.
        dtype: safetensors name of its dtype in the source.
        stored_as: its name in the source, if that does not follow from the prefix rule (`source_name`).
        nonzeros: for a linear, the number of kept weights.
        pattern: for a linear, unstructured, 4x1, 1x4 or n:m.
        negative_zeros: for a linear in fp32, the number of weights that are -0.0, if there are any.
        to: for a tied tensor, the embedding table that it equals.
    """

    shape: tuple[int, ...]
    kind: str
    dtype: str
    stored_as: str | None = None
    nonzeros: int | None = None
    pattern: str | None = None
    negative_zeros: int | None = None
    to: str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """For a linear, the fraction of pruned weights."""
        assert self.nonzeros is not None
        return 1 - self.nonzeros / self.size


@dataclass(frozen=True)
class Sizes:
    """Sizes of a packed folder; the compressed sizes are None if it is not compressed.

    Attributes:
        file: bytes of the tensor file before compression.
        encoder: bytes of the encoder's linear weights in it.
        bits_per_weight: bits per weight of the encoder's linear layers.
        entropy_bound: lower bound of `bits_per_weight` by entropy.
        compressed: bytes of the compressed file.
        compressed_encoder: bytes of the encoder's linear weights in it.
    """

    file: int
    encoder: int
    bits_per_weight: float
    entropy_bound: float
    compressed: int | None = None
    compressed_encoder: int | None = None
    compressed_bits_per_weight: float | None = None


InputScales = Mapping[str, tuple[float, int]]  # {canonical name of a linear: (scale, zero point) of its input}


@dataclass(frozen=True)
class Manifest:
    """manifest.json, with the fields of FORMAT.md.

    Attributes:
        architecture: the model class of the source; None if its config names none.
        input_scales: scales of static activations; None if they are dynamic.
        quantized: whether the weights have the scales of quantization-aware training, with dynamic activations.
        source: hash of the tensors that were packed.
        pruneofa: version of pruneofa that wrote it.
        tensors: all tensors by canonical name.
    """

    precision: str
    architecture: str | None
    prefix: str
    pattern_hash: str
    pooler_hash: str | None
    sparsity: float
    input_scales: InputScales | None
    quantized: bool
    source: str
    pruneofa: str
    compression: str | None
    checksum: str
    sizes: Sizes
    tensors: Mapping[str, Tensor]

    @property
    def linears(self) -> dict[str, Tensor]:
        """The encoder's linear weights, without the pooler."""
        return {
            name: tensor for name, tensor in self.tensors.items() if tensor.kind == "linear" and name != POOLER_WEIGHT
        }

    @property
    def tensor_file(self) -> str:
        """Name of the file that holds the tensors."""
        return COMPRESSED if self.compression else TENSORS

    def to_json(self) -> dict[str, Any]:
        """The JSON object of manifest.json, keys in the order of the file."""
        activations: dict[str, Any] = {"kind": "dynamic"}
        if self.input_scales is not None:
            activations = {"kind": "static", "scales": {name: [*pair] for name, pair in self.input_scales.items()}}
        return {
            "format": FORMAT,
            "version": VERSION,
            "precision": self.precision,
            "architecture": self.architecture,
            "prefix": self.prefix,
            "pattern_hash": self.pattern_hash,
            "pooler_hash": self.pooler_hash,
            "sparsity": self.sparsity,
            "activations": activations,
            **({"quantized": True} if self.quantized else {}),
            "source": self.source,
            "pruneofa": self.pruneofa,
            "compression": self.compression,
            "checksum": self.checksum,
            "sizes": _given(self.sizes),
            "tensors": {name: _given(tensor) | {"shape": [*tensor.shape]} for name, tensor in self.tensors.items()},
        }


def _given(record: Tensor | Sizes) -> dict[str, Any]:
    """The fields that are not None, in order."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in values.items() if value is not None}


def source_name(name: str, prefix: str) -> str:
    """The name in the source of the tensor with a canonical name, by prefix; exceptions are in `Tensor.stored_as`."""
    return prefix + name if name.split(".")[0] in families.base_modules() else name


def kind_of(name: str, ndim: int) -> str:
    """How a tensor of this canonical name is stored: "linear", "embedding" or "plain"."""
    if ndim == 2 and (name == POOLER_WEIGHT or is_encoder_weight(name, ndim)):
        return "linear"
    return "embedding" if ndim == 2 and name in families.embedding_weights() else "plain"


def is_packed(folder: Path) -> bool:
    """Whether the folder looks like a packed one."""
    return is_there(folder / MANIFEST) and any(is_there(folder / name) for name in (TENSORS, COMPRESSED))


def check_inputs(inputs: Mapping[str, tuple[float, int]]) -> None:
    """Check static activations: {canonical name of a linear: (scale, zero point) of its input}.

    Raises:
        InputError: a scale or zero point is out of range, or differs between query, key and value of a layer, which
            read the same input. The message names the layer.
    """
    seen: dict[str, tuple[str, tuple[float, int]]] = {}
    for name, (scale, zero) in sorted(inputs.items()):
        good = type(scale) is float and MIN_INPUT_SCALE <= scale <= MAX_INPUT_SCALE
        if not good or struct.unpack("f", struct.pack("f", scale))[0] != scale:
            raise InputError(
                f"input scale of {name} is {short(scale)}: its activations were constant or never observed; wanted a "
                f"float32 from {MIN_INPUT_SCALE:.1e} to {MAX_INPUT_SCALE:.1e}; calibrate on other examples"
            )
        if not is_count(zero) or zero > 255:
            raise InputError(f"input zero point of {name} is {short(zero)}; wanted an integer from 0 to 255")
        if shared := families.attention_input(name):
            first, same = seen.setdefault(shared, (name, (scale, zero)))
            if same != (scale, zero):
                raise InputError(
                    f"{name} and {first} read the same input but have input scale and zero point {[scale, zero]} and "
                    f"{list(same)}; wanted the same"
                )


def read_config(folder: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """config.json of a folder, with the activation of a cross-encoder.

    Raises InputError if it is not of a supported architecture or not the manifest's, and as `with_activation` does.
    """
    path = folder / "config.json"
    if manifest is None and not is_there(path):
        weight_files(folder)  # raises for a folder that is no model's, and says where there is one
    config = read_json(path, AGAIN if manifest is not None else WHOLE)
    model_type = config.get("model_type")
    if model_type not in families.model_types():
        wanted = ", ".join(families.model_types())
        raise InputError(f"{path}: model_type is {short(model_type)}; wanted one of {wanted}")
    if manifest is not None and (named := architecture(config, path)) != manifest.architecture:
        raise InputError(
            f"{path}: architecture {named}, but {manifest.architecture} in {MANIFEST}: "
            f"they belong to different models; {AGAIN}"
        )
    return with_activation(config, folder)


def architecture(config: Mapping[str, Any], path: Path) -> str | None:
    """The model class that a config names, or None."""
    named = config.get("architectures") or [None]
    if not isinstance(named, list) or not (named[0] is None or is_name(named[0])):
        raise InputError(f"{path}: architectures is {short(named)}; wanted a list of class names")
    return named[0]


def is_count(value: Any) -> bool:
    """Whether a JSON value is a non-negative integer; true and 1.0, which Python considers equal to 1, are not."""
    return type(value) is int and value >= 0


def is_name(value: Any) -> bool:
    """Whether a JSON value can be the name of a tensor or of a class."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
