"""Packed folder to Hugging Face folder: bit-identical from fp32, the rounded values from int8. No torch."""

from pathlib import Path

import numpy as np

from pruneofa.formats import scales
from pruneofa.formats.files import new_output
from pruneofa.formats.hub import local_folder
from pruneofa.formats.layout import Slot, header, in_order
from pruneofa.formats.manifest import Manifest, Tensor, source_name
from pruneofa.formats.manifest_reader import read_manifest
from pruneofa.formats.packed import Packed, read_with
from pruneofa.formats.scales import Quantization, QuantizationArgs
from pruneofa.formats.settings import copy_settings
from pruneofa.progress import progress


def unpack(packed: str | Path, out: str | Path) -> None:
    """Write the Hugging Face folder `out` of a packed folder or hub id.

    Names and dtypes are those of the source. From fp32 the weights are bit-identical to the source, from int8 they are
    the dequantized values. The scales of a quantized source are written too, so that packing gives the same bytes
    again. Raises InputError as `packed.read` does, or when `out` is not empty.
    """
    folder = local_folder(packed)
    with new_output(out) as temporary:
        manifest = read_manifest(folder)
        model = read_with(folder, manifest)
        tensors = {
            tensor.stored_as or source_name(name, manifest.prefix): (name, tensor)
            for name, tensor in manifest.tensors.items()
        }
        slots = in_order({stored: Slot(tensor.dtype, tensor.shape) for stored, (_, tensor) in tensors.items()})
        copy_settings(folder, temporary)
        with (
            open(temporary / "model.safetensors", "wb") as file,
            progress(f"unpacking {packed}", len(slots)) as advance,
        ):
            file.write(header(slots, {"format": "pt"}))
            for stored, slot in slots.items():
                file.write(_narrow(_dense(model, *tensors[stored]), slot.dtype).reshape(-1).data)
                advance()
        if model.quantized:
            scales.write(temporary, _quantization(model, manifest))


def _quantization(model: Packed, manifest: Manifest) -> Quantization:
    """The scales for the Hugging Face folder of a packed model whose source was quantized."""
    static, inputs = model.input_scales is not None, model.input_scales or {}
    linears = {name: linear.scale for name, linear in model.linears.items() if linear.scale is not None}
    tables = {name: table.scale for name, table in model.embeddings.items() if table.scale is not None}
    # If all rows of every layer have the same scale, the strategy was "tensor", whose lowest code is -128.
    shared = all((scale == scale[0]).all() for scale in linears.values())
    return Quantization(
        weights=QuantizationArgs("tensor" if shared else "channel", symmetric=True),
        input_activations=QuantizationArgs("tensor" if static else "token", symmetric=False, dynamic=not static),
        embeddings=QuantizationArgs("channel", symmetric=True) if tables else None,
        weight_scale=linears | tables,
        input_scale={name: scale for name, (scale, _) in inputs.items()},
        input_zero_point={name: zero for name, (_, zero) in inputs.items()},
        pattern_hash=manifest.pattern_hash,
        pooler_hash=manifest.pooler_hash,
    )


def _dense(model: Packed, name: str, tensor: Tensor) -> np.ndarray:
    """A tensor of a packed model as float32."""
    if tensor.kind == "linear":
        return model.linears[name].dense()
    if tensor.kind in ("embedding", "tied"):
        return model.embeddings[tensor.to or name].rows(slice(None))
    return model.plain[name]


def _narrow(weight: np.ndarray, dtype: str) -> np.ndarray:
    """Convert float32 to the source's dtype, rounding half to even; exact for values that came from that dtype."""
    if dtype == "F16":
        return weight.astype("<f2")
    if dtype == "BF16":  # the upper half of a float32
        bits = weight.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return weight
