"""Convert a Hugging Face folder to a packed model in memory, without the hashes that only a manifest needs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.formats import scales
from pruneofa.formats.manifest import PRECISIONS, is_packed, kind_of, read_config
from pruneofa.formats.packed import MAX_SCALE, Packed, PackedEmbedding, PackedLinear
from pruneofa.formats.scales import Quantization
from pruneofa.formats.source import Source, read_float, source_prefix, source_tensors
from pruneofa.formats.tensors import StoredTensor

_ROWS = 4096  # rows quantized at a time, to limit memory: an embedding table has tens of thousands


def convert(folder: Path, precision: str = "int8", *, advance: Callable[[], object] = lambda: None) -> Packed:
    """Convert a Hugging Face folder to a packed model, without a tied decoder, which equals the word embeddings.

    With precision int8 a quantized folder keeps its scales; with fp32 its weights are stored unchanged. Its sparsity
    pattern must have the hash that is stored with the scales. `advance` is called after each tensor.

    Raises InputError if the folder is not a supported model or is already packed.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; wanted one of {', '.join(PRECISIONS)}")
    if is_packed(folder):
        raise InputError(f"{folder}: is already packed; wanted a Hugging Face folder; make one with: pruneofa unpack")
    config = read_config(folder)
    found = source_tensors(folder)
    source_prefix(folder, found)
    quantization = scales.read(folder)
    known = quantization if precision == "int8" else None
    model = Packed(folder, config, precision, _input_scales(known), known is not None, {}, {}, {})
    for name, (original, stored) in sorted(found.items()):
        weight = read_float(original, stored)
        kind = kind_of(name, weight.ndim)
        if _is_tied(name, stored, weight, found):
            advance()
            continue
        if kind == "linear":
            model.linears[name] = pack_linear(weight, precision, _known_codes(known, name, weight, folder))
        elif kind == "embedding":
            codes = _known_codes(known, name, weight, folder)
            values, scale = codes or (quantize_weight(weight) if precision == "int8" else (weight, None))
            model.embeddings[name] = PackedEmbedding(values, scale)
        else:
            model.plain[name] = weight
        advance()
    if quantization is not None and (quantization.pattern_hash or quantization.pooler_hash):
        scales.check_pattern(folder, quantization, *model.hashes())
    return model


def pack_linear(weight: np.ndarray, precision: str, codes: tuple[np.ndarray, np.ndarray] | None = None) -> PackedLinear:
    """Pack a float32 weight (rows, columns). The pattern is where it is not zero, even if the int8 code is 0.

    `codes` are int8 codes (rows, columns) and float32 scales (rows,), if known; otherwise `quantize_weight` computes
    them.
    """
    kept = weight != 0
    bits = np.packbits(kept, axis=1, bitorder="little")
    if precision == "int8":
        quantized, scale = codes or quantize_weight(weight)
        return PackedLinear(weight.shape, bits, quantized[kept], scale)
    negative = np.packbits(np.signbit(weight) & ~kept, axis=1, bitorder="little")
    return PackedLinear(weight.shape, bits, weight[kept], None, negative if negative.any() else None)


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (rows, columns) and scale float32 (rows,) of a float32 weight, all in float32.

    q = clip(rint(w / s), -127, 127), half to even, with s = max|row| / 127, and s = 1 for an all-zero row. s is
    clamped so that it is not 0 and 127 * s is finite in float32. 1 / s need not be: nothing multiplies by it.
    """
    quantized = np.empty(weight.shape, np.int8)
    scale = np.empty(len(weight), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        largest = np.abs(weight[rows]).max(axis=1)
        scale[rows] = np.clip(largest / np.float32(127), np.float32(2**-149), MAX_SCALE)
        scale[rows][largest == 0] = 1
        quantized[rows] = np.clip(np.rint(weight[rows] / scale[rows, None]), -127, 127)
    return quantized, scale


def _known_codes(
    known: Quantization | None, name: str, weight: np.ndarray, folder: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """int8 codes and scales of a weight that was quantized in training; None for any other weight."""
    if known is None or name not in known.weight_scale:
        return None
    scale = known.weight_scale[name]
    try:
        return scales.codes(name, weight, scale, known.lowest if kind_of(name, 2) == "linear" else -127), scale
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _input_scales(known: Quantization | None) -> dict[str, tuple[float, int]] | None:
    """{canonical name: (scale, zero point)} of the input of each linear; None if activations are dynamic."""
    if known is None or known.input_activations.dynamic:
        return None
    return {name: (float(known.input_scale[name]), int(known.input_zero_point[name])) for name in known.linears()}


def _is_tied(name: str, stored: StoredTensor, weight: np.ndarray, found: Source) -> bool:
    """Whether this is the decoder of a masked-LM head and bit-identical to the word embeddings."""
    table = families.tied_to(name)
    if table is None or table not in found:
        return False
    original, words = found[table]
    if (stored.dtype, stored.shape) != (words.dtype, words.shape):
        return False
    return np.array_equal(read_float(original, words).view(np.uint32), weight.view(np.uint32))
