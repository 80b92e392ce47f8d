"""The manifest of a packed model: counts, hashes and sizes. Needed for packing, not for inference."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pruneofa import __version__, families
from pruneofa.formats.layout import figures
from pruneofa.formats.manifest import Manifest, Sizes, Tensor, architecture, kind_of, source_name
from pruneofa.formats.packed import Packed, PackedLinear
from pruneofa.formats.pattern import pattern_of
from pruneofa.formats.source import Source, read_float, source_prefix, source_tensors


@dataclass(frozen=True)
class TensorFile:
    """Sizes and checksum of a tensor file that has been written.

    Attributes:
        size: bytes before compression, of which `checksum` is computed.
        compressed: bytes after compression; None if not compressed.
        compressed_encoder: compressed bytes of the encoder's weights; None if not compressed.
    """

    size: int
    checksum: str
    compressed: int | None = None
    compressed_encoder: int | None = None


def describe_tensors(model: Packed) -> dict[str, Tensor]:
    """The manifest entries of a model made by `convert`, sorted by canonical name."""
    found = source_tensors(model.folder)
    prefix = source_prefix(model.folder, found)
    tensors = {}
    for name, (original, stored) in sorted(found.items()):
        named = None if source_name(name, prefix) == original else original
        kind = kind_of(name, len(stored.shape))
        if name in model.linears:
            tensors[name] = _linear(model.linears[name], stored.dtype, named)
        elif name in model.embeddings or name in model.plain:
            tensors[name] = Tensor(stored.shape, kind, stored.dtype, named)
        else:
            tensors[name] = Tensor(stored.shape, "tied", stored.dtype, named, to=families.tied_to(name))
    return tensors


def describe(
    model: Packed, tensors: dict[str, Tensor], file: TensorFile, advance: Callable[[], object] = lambda: None
) -> Manifest:
    """The manifest of a model made by `convert`, with `tensors` from `describe_tensors`, written to `file`.

    The source folder is read again to compute its hash; `advance` is called after each tensor.
    """
    found = source_tensors(model.folder)
    pattern_hash, pooler_hash = model.hashes()
    numbers = figures(tensors, model.precision)
    bits, encoder = numbers["bits_per_weight"], int(numbers["encoder"])
    compressed_bits = None if file.compressed_encoder is None else file.compressed_encoder / encoder * bits
    return Manifest(
        precision=model.precision,
        architecture=architecture(model.config, model.folder / "config.json"),
        prefix=source_prefix(model.folder, found),
        pattern_hash=pattern_hash,
        pooler_hash=pooler_hash,
        sparsity=numbers["sparsity"],
        input_scales=model.input_scales,
        quantized=model.quantized and model.input_scales is None,  # static activations imply it
        source=_source_hash(found, advance),
        pruneofa=__version__,
        compression=None if file.compressed is None else "zstd",
        checksum=file.checksum,
        sizes=Sizes(
            file.size,
            encoder,
            bits,
            numbers["entropy_bound"],
            file.compressed,
            file.compressed_encoder,
            compressed_bits,
        ),
        tensors=tensors,
    )


def _linear(linear: PackedLinear, dtype: str, stored_as: str | None) -> Tensor:
    negative = None
    if linear.negative_zeros is not None:
        negative = int(np.bitwise_count(linear.negative_zeros).sum(dtype=np.int64))
    pattern, nonzeros = pattern_of(linear.kept), linear.values.size
    return Tensor(linear.shape, "linear", dtype, stored_as, nonzeros, pattern, negative)


def _source_hash(found: Source, advance: Callable[[], object]) -> str:
    """Hex sha256 of every tensor that is packed: its name in the source, dtype, shape and float32 values."""
    digest = hashlib.sha256()
    for _, (original, stored) in sorted(found.items()):
        digest.update(f"{original}\0{stored.dtype}\0{'x'.join(map(str, stored.shape))}\0".encode())
        digest.update(read_float(original, stored).reshape(-1).data)
        advance()
    return digest.hexdigest()
