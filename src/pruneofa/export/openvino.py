"""OpenVINO export by conversion of the ONNX graph: it keeps the names, and OpenVINO's int8 kernels need QDQ."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.errors import InputError
from pruneofa.export import onnx as export_onnx
from pruneofa.export.source import Arrays, Exported, Source
from pruneofa.families import canonical_name

MODULES = ("openvino", "onnx", "onnxscript")
FILE = "openvino_model.xml"
_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
_ABOUT = ("layerType", "runtimePrecision", "originalLayersNames")


def write(source: Source, folder: Path) -> None:
    """Write openvino_model.xml and .bin. Raises InputError for dynamic activations, which OpenVINO runs in float."""
    import openvino

    if source.quantization is not None and source.quantization.input_activations.dynamic:
        raise InputError(
            f"{source.folder}: its activations are quantized per token (dynamic), for which OpenVINO has no int8 "
            "operator; export --to onnx, or make static scales: `pruneofa quantize` with --activations static"
        )
    export_onnx.write(source, folder)
    # Not convert_model, which transposes weights, so that they lose their names.
    model = openvino.Core().read_model(folder / export_onnx.FILE)
    # The default is a half-precision file, which would change the weights.
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)
    del model
    for file in folder.glob(f"{export_onnx.FILE}*"):
        file.unlink()


def load(source: Source, folder: Path) -> Exported:
    """openvino_model.xml compiled for the CPU; layers that are not int8 run in float32, which is not the default."""
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / FILE)
    compiled = core.compile_model(model, "CPU", _SETTINGS)
    request = compiled.create_infer_request()
    found = _multiplied(model)
    aliases = source.stored_as(arrays := {name: array for name, (_, array) in found.items()})
    precisions = _precisions(compiled)

    def run(inputs: Arrays) -> tuple[NDArray[np.float32], ...]:
        results = request.infer(inputs, share_inputs=True)
        return tuple(np.array(results[name]) for name in source.outputs)

    executed = {name: precisions.get(product, "") for name, (product, _) in found.items()}
    return Exported(
        run=run,
        weights={name: arrays[alias] for name, alias in aliases.items()},
        executed={name: executed[alias] for name, alias in aliases.items() if executed[alias]},
        settings=_SETTINGS,
    )


def _multiplied(model: Any) -> dict[str, tuple[str, NDArray[Any]]]:
    """{canonical name of a weight: (name of its matrix product, stored array (rows, columns))}."""
    found = {}
    for product in model.get_ops():
        if product.get_type_name() != "MatMul":
            continue
        node = product.input_value(1).get_node()
        while node.get_type_name() in ("Multiply", "Subtract", "Convert"):  # codes to floats
            node = node.input_value(0).get_node()
        if node.get_type_name() == "Constant":
            array = node.data if product.get_attributes()["transpose_b"] else node.data.T
            found[canonical_name(node.get_friendly_name())] = product.get_friendly_name(), np.ascontiguousarray(array)
    return found


def _precisions(compiled: Any) -> dict[str, str]:
    """{name of a matrix product: "FullyConnected u8"} of those that the compiled model runs in int8."""
    found = {}
    for node in compiled.get_runtime_model().get_ops():
        about = {key: node.get_rt_info()[key].astype(str) for key in _ABOUT}
        kind, precision, names = (about[key] for key in _ABOUT)
        if kind in ("FullyConnected", "MatMul") and precision in ("u8", "i8"):
            found |= {name: f"{kind} {precision}" for name in names.split(",")}
    return found
