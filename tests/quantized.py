"""Hugging Face folders on the int8 grid, made from any folder without torch and without data."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from pruneofa.families import attention_input, canonical_name
from pruneofa.formats import pattern
from pruneofa.formats import scales as quantization
from pruneofa.formats.manifest import kind_of
from pruneofa.formats.scales import Quantization, QuantizationArgs

STATIC = QuantizationArgs("tensor", False)
DYNAMIC = QuantizationArgs("token", False, dynamic=True)


def fake_quantized(weight: np.ndarray, strategy: str) -> tuple[np.ndarray, np.ndarray]:
    """A weight (rows, columns) on the grid, and its scale (rows,), by the formulas of FORMAT.md."""
    largest = np.abs(weight).max(axis=1)
    if strategy == "tensor":
        scale = np.full(len(weight), largest.max() / np.float32(127.5) or 1, np.float32)
    else:
        scale = np.where(largest == 0, np.float32(1), largest / np.float32(127)).astype(np.float32)
    lowest = -128 if strategy == "tensor" else -127
    code = np.clip(np.rint(weight / scale[:, None]), lowest, 127).astype(np.int8)
    return code * scale[:, None], scale


def quantize_folder(
    folder: Path, *, strategy: str = "channel", static: bool = True, embeddings: bool = True
) -> Quantization:
    """Put the weights of a folder on the grid, in place, with made-up scales of activations; returns what it wrote."""
    tensors = load_file(folder / "model.safetensors")
    scales, inputs, zeros, made = {}, {}, {}, {}
    for original in sorted(tensors):
        name, kind = canonical_name(original), kind_of(canonical_name(original), tensors[original].ndim)
        if kind == "plain" or (kind == "embedding" and not embeddings):
            continue
        tensors[original], scales[name] = fake_quantized(tensors[original], strategy if kind == "linear" else "channel")
        if kind == "linear" and static:
            shared = attention_input(name) or name
            number = len(made)
            made.setdefault(shared, (float(np.float32((20 + 3 * number % 20) / 1000)), 90 + 11 * number % 70))
            inputs[name], zeros[name] = made[shared]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hashes = pattern.inspect(folder)
    found = Quantization(
        weights=QuantizationArgs(strategy, True),
        input_activations=STATIC if static else DYNAMIC,
        embeddings=QuantizationArgs("channel", True) if embeddings else None,
        weight_scale=scales,
        input_scale=inputs,
        input_zero_point=zeros,
        pattern_hash=hashes["pattern_hash"],
        pooler_hash=hashes["pooler_hash"],
    )
    quantization.write(folder, found)
    return found
