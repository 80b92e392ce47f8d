"""The files that peers load, made once per shape from the same Hugging Face folder: ONNX and OpenVINO, int8 too.

Like `peers.py`, this file is the program of a process that answers JSON requests, but it needs pruneofa.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.bench.peers import PEERS, Job, answer_requests, read_inputs, torch_inputs, torch_model
from pruneofa.formats.architecture import read_architecture
from pruneofa.formats.cache import cached_folder
from pruneofa.formats.manifest import read_config

_CALIBRATION = 16  # sequences for post-training quantization, beside the inputs: every batch runs many times in fp32
# The opset that both the exporter and DeepSparse, last released in 2024, support.
_OLD_OPSET = 14


def prepare(peer: str, job: Job) -> dict[str, Any]:
    """Make the files that a peer loads."""
    make(PEERS[peer].artifact, job)
    return {}


def make(artifact: str, job: Job) -> None:
    """Make one folder of the job's artifacts, and those it is made from, unless it is there, undamaged.

    Raises the errors of the exporters, and RuntimeError when onnxruntime left linear layers unquantized.
    """
    if artifact in _SOURCE:
        make(_SOURCE[artifact], job)
    if artifact:
        cached_folder(Path(job["artifacts"]) / artifact, partial(_MAKERS[artifact], job))


def _onnx(job: Job, folder: Path) -> None:
    _export(job, folder, dynamo=True, verbose=False)


def _onnx_old(job: Job, folder: Path) -> None:
    _export(job, folder, dynamo=False, opset_version=_OLD_OPSET)


def _export(job: Job, folder: Path, **options: Any) -> None:
    import torch

    names = {"input_names": list(read_inputs(job)), "output_names": ["hidden"]}
    torch.onnx.export(torch_model(job), torch_inputs(job), str(folder / "model.onnx"), **names, **options)


def _onnx_int8(job: Job, folder: Path) -> None:
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Only constant weights are quantized, so transposed ones of any size must be folded to constants first.
    folded = folder / "folded.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.data")
    source = Path(job["artifacts"]) / "onnx" / "model.onnx"
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(folded))
    del model.graph.value_info[:]  # shapes that the quantizer's own would contradict
    quantize_dynamic(model, str(folder / "model.onnx"), weight_type=QuantType.QInt8)
    for file in folder.glob("folded.*"):
        file.unlink()
    _check_quantized(onnx.load(str(folder / "model.onnx")), Path(job["folder"]))


def _check_quantized(model: Any, folder: Path) -> None:
    wanted = 6 * read_architecture(read_config(folder), folder).layers
    quantized = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    if quantized < wanted:
        raise RuntimeError(f"onnxruntime quantized {quantized} of the {wanted} linear layers of the exported graph")


def _openvino(job: Job, folder: Path) -> None:
    import openvino

    # Several rows may be taken in parts, of other shapes; those that are fixed are fixed when it is loaded.
    shapes = [(name, list(array.shape) if len(array) == 1 else [-1, -1]) for name, array in read_inputs(job).items()]
    model = openvino.convert_model(torch_model(job), example_input=torch_inputs(job), input=shapes)
    # Half-precision files are its default; the weights should be the same everywhere.
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def _openvino_int8(job: Job, folder: Path) -> None:
    import nncf
    import openvino

    inputs = read_inputs(job)
    ids, random = inputs["input_ids"], np.random.default_rng(1)
    low, high = int(ids.min()), int(ids.max()) + 1
    batches = max(1, _CALIBRATION // len(ids))
    samples = [inputs, *({**inputs, "input_ids": random.integers(low, high, ids.shape)} for _ in range(batches))]
    model = openvino.Core().read_model(Path(job["artifacts"]) / "openvino" / "model.xml")
    data = nncf.Dataset(samples)
    quantized = nncf.quantize(model, data, subset_size=len(samples), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)


_SOURCE = {"onnx-int8": "onnx", "openvino-int8": "openvino"}
_MAKERS = {
    "onnx": _onnx,
    "onnx-old": _onnx_old,
    "onnx-int8": _onnx_int8,
    "openvino": _openvino,
    "openvino-int8": _openvino_int8,
}


if __name__ == "__main__":
    answer_requests({"prepare": prepare})
