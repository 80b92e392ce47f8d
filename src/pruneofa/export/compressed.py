"""compressed-tensors `int-quantized`: a Hugging Face folder of int8 weights that stock transformers loads."""

import contextlib
import copy
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pruneofa.export.source import Arrays, Exported, Source, Traced
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats.pattern import read_weights
from pruneofa.formats.scales import Quantization
from pruneofa.train.models import read_model

MODULES = ("compressed_tensors",)
_FORMAT = "int-quantized"
# Activations are int8 in compressed-tensors and uint8 in the engine: codes and zero points differ by 128.
_SHIFT = 128


def write(source: Source, folder: Path) -> None:
    """Write model.safetensors and config.json; embeddings and heads stay float32 with unchanged values."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    found = source.quantization
    assert found is not None
    model = copy.deepcopy(source.model)
    quantized = {name: at for name, at in source.linears.items() if not (name == POOLER_WEIGHT and _whole_batch(found))}
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    scheme = {
        "targets": ["Linear"],
        "weights": dataclasses.asdict(found.weights),
        "input_activations": dataclasses.asdict(found.input_activations),
    }
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=_FORMAT, ignore=sorted(linears - set(quantized.values()))
    )
    compressor = ModelCompressor(quantization_config=config, force_compression_format=_FORMAT)
    with _quiet():
        apply_quantization_config(model, config)
        for name, at in quantized.items():
            _set_scales(model.get_submodule(at), found, name)
        compressor.compress_model(model)
        model.save_pretrained(folder)
    compressor.update_config(str(folder))


def load(source: Source, folder: Path) -> Exported:
    """Load the folder in transformers, which computes in float with the int8 codes, so it is not faster.

    transformers computes rint(x / scale + zero point), the engine rint(x / scale) + zero point. So a number halfway
    between two codes can get another code.
    """
    with _quiet():
        model, _ = read_model(type(source.model), folder)
    traced = Traced(model.eval(), source)

    def run(inputs: Arrays) -> tuple[NDArray[np.float32], ...]:
        with _quiet(), torch.no_grad():  # the first call decompresses the weights and shows a progress bar
            results = traced(*(torch.from_numpy(array) for array in inputs.values()))
        return tuple(result.numpy() for result in results)

    weights = dict(read_weights(folder, lambda name, _: name in source.linears))
    return Exported(run=run, weights=weights, executed={}, settings={})


def _whole_batch(found: Quantization) -> bool:
    """Whether the pooler's input would get one scale for the whole batch: scales per token need 3-D inputs.

    The result of a text would then depend on the other texts of the batch, so the pooler stays float32.
    """
    return found.input_activations.dynamic


def _set_scales(layer: Any, found: Quantization, name: str) -> None:
    scale = torch.from_numpy(found.weight_scale[name].copy())
    layer.weight_scale.data = scale[:1] if found.weights.strategy == "tensor" else scale[:, None]
    if not found.input_activations.dynamic:
        layer.input_scale.data = torch.tensor([found.input_scale[name]], dtype=torch.float32)
        layer.input_zero_point.data = torch.tensor([found.input_zero_point[name] - _SHIFT], dtype=torch.int8)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars that compressed-tensors shows for every short step."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
