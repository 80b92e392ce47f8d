"""ONNX export: a float graph, or one that ONNX Runtime runs in int8 with exactly the scales of the folder.

Static activations become QuantizeLinear/DequantizeLinear pairs (QDQ). Dynamic activations have one scale per token, for
which ONNX has no operator (`DynamicQuantizeLinear` has one per tensor). They are expressed by elementary operators
around MatMulInteger and compute the same as the engine.
"""

import contextlib
import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pruneofa.export.source import Exported, Source, Traced, example_inputs
from pruneofa.families import canonical_name

MODULES = ("onnx", "onnxruntime", "onnxscript")
PARTS = ("onnx", "onnxscript")
FILE = "model.onnx"
# A session option: without it int8 products on x86 CPUs without VNNI are summed in 16 bits, which overflows.
EXACT = {"session.x64quantprecision": "1"}
_EXACT_WEIGHT = "_s8_2_u8"  # suffix of the weights that ONNX Runtime converts with this option
# The operators that multiply int8 codes in an optimized graph.
_INT8 = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul")
_OPSET = 20
_MAX_SINGLE_FILE = 1_500_000_000  # bytes; protobuf is limited to 2 GiB


def write(source: Source, folder: Path) -> None:
    """Write model.onnx; batch and tokens may have any size."""
    axes = {0: "batch", 1: "sequence"}
    size = sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters())
    with _prepared(source), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            Traced(source.model, source).eval(),
            example_inputs(source),
            input_names=list(source.inputs),
            output_names=list(source.outputs),
            dynamo=True,
            dynamic_shapes=(axes,) * len(source.inputs),
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None  # only the old exporter returns None
        for node in program.model.graph:
            node.metadata_props.clear()  # stack traces, with the paths of this machine
        program.save(folder / FILE, external_data=size > _MAX_SINGLE_FILE)


def load(source: Source, folder: Path) -> Exported:
    """model.onnx in ONNX Runtime, and the graph after its optimizations."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    settings = EXACT if _overflows() else {}
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory() as temporary:
        options.optimized_model_filepath = str(Path(temporary) / FILE)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
        executed = onnx.load(str(Path(temporary) / FILE), load_external_data=False).graph
    stored = onnx.load(str(folder / FILE)).graph
    arrays = {
        canonical_name(tensor.name): np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
        for tensor in stored.initializer
    }
    found = {
        canonical_name(name.removesuffix(_EXACT_WEIGHT)): node.op_type
        for node in executed.node
        if node.op_type in _INT8
        for name in node.input
    }
    aliases = source.stored_as(arrays)
    return Exported(
        run=lambda inputs: tuple(map(np.asarray, session.run(list(source.outputs), inputs))),
        weights={name: arrays[alias] for name, alias in aliases.items()},
        executed={name: found[alias] for name, alias in aliases.items() if alias in found},
        settings=settings,
    )


def _overflows() -> bool:
    """Whether this is an x86 CPU without VNNI, as far as can be determined."""
    flags = Path("/proc/cpuinfo")
    return platform.machine() in ("x86_64", "AMD64") and not (flags.exists() and "vnni" in flags.read_text())


@contextlib.contextmanager
def _prepared(source: Source) -> Iterator[None]:
    """Replace the model's linears and tables by modules that export to the wanted operators, inside the block."""
    replaced = {}
    try:
        for name, at in source.linears.items():
            replaced[at] = source.model.get_submodule(at)
            source.model.set_submodule(at, _linear(source, name, replaced[at]))
        if source.quantization is not None and source.quantization.embeddings is not None:
            for name, at in source.tables.items():
                replaced[at] = source.model.get_submodule(at)
                source.model.set_submodule(at, _Table(*source.codes(name)))
        yield
    finally:
        for at, module in replaced.items():
            source.model.set_submodule(at, module)


def _linear(source: Source, name: str, layer: Any) -> nn.Module:
    found = source.quantization
    if found is None:
        return _Float(layer)
    if found.input_activations.dynamic:
        return _Dynamic(*source.codes(name), layer.bias)
    return _Static(
        *source.codes(name), layer.bias, scale=found.input_scale[name], zero_point=found.input_zero_point[name]
    )


class _Float(nn.Module):
    """A linear whose weight is stored as (inputs, outputs), the layout of MatMul, so that it keeps its name."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        return x @ self.weight + self.bias


class _Int8(nn.Module):
    """Codes int8 (inputs, outputs), their scale (outputs,) and the bias."""

    def __init__(self, codes: NDArray[np.int8], scale: NDArray[np.float32], bias: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(np.ascontiguousarray(codes.T)))
        self.register_buffer("weight_scale", torch.from_numpy(scale.copy()))
        self.bias = bias


class _Static(_Int8):
    """QDQ: the runtime multiplies the codes on both sides and needs no float product."""

    def __init__(self, *weight: Any, scale: float, zero_point: int) -> None:
        super().__init__(*weight)
        self.register_buffer("input_scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("input_zero_point", torch.tensor(zero_point, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs); only to be exported."""
        if x.ndim == 2:  # the pooler: ONNX Runtime would convert it to a Gemm and run that in float
            return self(x[:, None]).squeeze(1)
        given = (self.input_scale, self.input_zero_point)
        codes = _node("QuantizeLinear", (x, *given), torch.uint8, x.shape)
        rounded = _node("DequantizeLinear", (codes, *given), torch.float32, x.shape)
        # The zero point of weights, 0, is omitted: layers would share one tensor, and EXACT fails on a shared tensor.
        weight = (self.weight, self.weight_scale)
        return rounded @ _node("DequantizeLinear", weight, torch.float32, self.weight.shape, axis=1) + self.bias


class _Dynamic(_Int8):
    """A scale per token. The zero point is subtracted after the product, which every runtime supports."""

    def __init__(self, *weight: Any) -> None:
        super().__init__(*weight)
        self.register_buffer("weight_sum", self.weight.sum(dim=0, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs); only to be exported."""
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        # As in `reference.quantize_rows`.
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
        zero_point = torch.round(-low / scale)
        codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 255).to(torch.uint8)
        shape = (*x.shape[:-1], self.weight.shape[1])
        total = _node("MatMulInteger", (codes, self.weight), torch.int32, shape)
        return (total - zero_point.to(torch.int32) * self.weight_sum).float() * (scale * self.weight_scale) + self.bias


class _Table(nn.Module):
    """An embedding table of int8 codes, (rows, hidden), and their scale (rows,)."""

    def __init__(self, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(codes))
        self.register_buffer("weight_scale", torch.from_numpy(scale[:, None].copy()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) to (batch, tokens, hidden)."""
        embedding = nn.functional.embedding
        return embedding(ids, self.weight).float() * embedding(ids, self.weight_scale)


def _node(operator: str, inputs: tuple[Any, ...], dtype: torch.dtype, shape: Any, **attributes: Any) -> torch.Tensor:
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape, version=_OPSET)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings, which concern only the exporter: torchvision operators, names of axes."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
