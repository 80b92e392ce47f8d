"""The runtimes that `pruneofa bench` compares, each in its own process that answers JSON requests on standard input.

This file is the program of those processes. Its top imports nothing but the standard library and NumPy, and
nothing of pruneofa, so that an interpreter that has a peer but not pruneofa can run it too.

A *job* is a dict: "folder" (Hugging Face folder), "packed" (the same model packed), "artifacts" (folder of what
`peer_files` made for this case), "inputs" (.npz of input_ids and, where there is padding, attention_mask), "threads",
"isa" and "precision" (only for pruneofa), and "together" (see `batches`).
"""

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Job = Mapping[str, Any]
Run = Callable[[], list[np.ndarray]]  # the hidden states of each of the job's `batches`

# Variables that limit the ISA of a library. They are removed from the environment of the user's shell.
CAPPING = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "NM_ARCH")
_AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
_TORCH_CAPS = {
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", **_AVX512},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", **_AVX512},
    "avxvnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
_OPENVINO_CAPS = {
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
_DEEPSPARSE_CAPS = {isa: {"NM_ARCH": "avx512"} for isa in ("avx512bf16", "avx512vnni")} | {"avx2": {"NM_ARCH": "avx2"}}


@dataclass(frozen=True)
class Peer:
    """A way to run an encoder.

    Attributes:
        kind: "fp32", "bf16" or "int8", which determines the tolerance of its output.
        modules: modules that its process imports before timing starts.
        packages: the packages to `pip install` for it.
        build: maps a job to a function that runs it once.
        artifact: the folder in a job's artifacts that `build` loads (`peer_files.make` makes it); "" where it
            loads the Hugging Face folder or, for pruneofa, the packed one.
        makers: modules that are needed to make the artifact.
        caps: {ISA: environment variables that limit it to this ISA}; other ISAs are not supported.
        dense: whether it multiplies by the zeros.
        divides: whether it takes a batch in parts.
    """

    name: str
    kind: str
    modules: tuple[str, ...]
    packages: str
    build: Callable[[Job], Run]
    artifact: str = ""
    makers: tuple[str, ...] = ()
    caps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    dense: bool = True
    divides: bool = False

    def missing(self, *, elsewhere: bool = False) -> list[str]:
        """Modules that are not installed here; `elsewhere`: another interpreter runs it, this one only prepares."""
        wanted = self.makers if elsewhere else (*self.modules, *self.makers)
        return [name for name in wanted if importlib.util.find_spec(name) is None]

    def size(self, job: Job) -> int:
        """Bytes on disk of the weights it loads."""
        if self.artifact:
            files = (Path(job["artifacts"]) / self.artifact).iterdir()
        else:
            files = Path(job["packed"] if self.name == PRUNEOFA else job["folder"]).glob("*.safetensors*")
        return sum(path.stat().st_size for path in files if path.suffix != ".json")


def read_inputs(job: Job) -> dict[str, np.ndarray]:
    """The job's input_ids int64 (batch, seq) and, where rows are padded, their attention_mask, in this order."""
    with np.load(job["inputs"]) as stored:
        return {name: stored[name] for name in ("input_ids", "attention_mask") if name in stored}


def batches(job: Job) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The job's inputs and their rows: all, or "together" rows of similar length at a time, with little padding."""
    inputs = read_inputs(job)
    count, most = inputs["input_ids"].shape
    if not (together := job.get("together")):
        return [(np.arange(count), inputs)]
    lengths = inputs["attention_mask"].sum(axis=1) if "attention_mask" in inputs else np.full(count, most)
    order = np.argsort(-lengths, kind="stable")
    parts = [order[begin : begin + together] for begin in range(0, count, together)]
    return [(part, {name: np.ascontiguousarray(array[part, : lengths[part].max()]) for name, array in inputs.items()})
            for part in parts]  # fmt: skip


def joined(job: Job, outputs: list[np.ndarray]) -> np.ndarray:
    """The outputs of `batches` as float32 (batch, seq, hidden), 0 behind the end of a part."""
    whole = np.zeros((*read_inputs(job)["input_ids"].shape, outputs[0].shape[-1]), np.float32)
    for (rows, _), output in zip(batches(job), outputs, strict=True):
        whole[rows, : output.shape[1]] = output
    return whole


def _pruneofa(job: Job) -> Run:
    from pruneofa.engine.engine import Engine

    engine = Engine.from_pretrained(
        job["packed"], precision=job["precision"], threads=job["threads"], isa=job.get("isa")
    )
    inputs = read_inputs(job)
    return lambda: [engine.encode(**inputs)]


def torch_model(job: Job) -> Any:
    """The encoder without its pooler, from token ids to the last hidden state."""
    import torch
    from transformers import AutoModel

    class LastHiddenState(torch.nn.Module):
        def __init__(self, encoder: torch.nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    model = AutoModel.from_pretrained(job["folder"], dtype=torch.float32, trust_remote_code=False)
    if hasattr(model, "pooler"):
        model.pooler = None  # as add_pooling_layer=False does, which not every class takes
    return LastHiddenState(model).eval()


def torch_inputs(job: Job) -> tuple[Any, ...]:
    """`read_inputs` as tensors."""
    import torch

    return tuple(torch.from_numpy(array) for array in read_inputs(job).values())


def _torch_run(model: Any, job: Job) -> Run:
    import torch

    tensors = [[torch.from_numpy(array) for array in part.values()] for _, part in batches(job)]

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            return [model(*part).float().numpy() for part in tensors]

    return run


def _torch_fp32(job: Job) -> Run:
    return _torch_run(torch_model(job), job)


def _torch_bf16(job: Job) -> Run:
    import torch

    # Not autocast: without gradients it converts every weight again in every call, and this peer would lose.
    return _torch_run(torch_model(job).to(torch.bfloat16), job)


def _torch_int8(job: Job) -> Run:
    return _torch_run(quantize_dynamic(torch_model(job)), job)


def quantize_dynamic(module: Any) -> Any:
    """The module with torch's dynamic int8 in its linear layers."""
    import torch

    torch.backends.quantized.engine = "onednn"
    return torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)


def _onnxruntime(artifact: str) -> Callable[[Job], Run]:
    def build(job: Job) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
        path = Path(job["artifacts"]) / artifact / "model.onnx"
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = read_inputs(job)
        return lambda: [np.asarray(session.run(None, inputs)[0])]

    return build


def _openvino(artifact: str) -> Callable[[Job], Run]:
    def build(job: Job) -> Run:
        import openvino

        core, parts = openvino.Core(), [list(part.values()) for _, part in batches(job)]
        model = core.read_model(Path(job["artifacts"]) / artifact / "model.xml")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": job["threads"]}
        if len({ids.shape for ids, *_ in parts}) == 1:  # fixed shapes are faster
            model.reshape({name: list(parts[0][0].shape) for name in read_inputs(job)})
        if len(parts) == 1:
            options |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
            request = core.compile_model(model, "CPU", options).create_infer_request()
            return lambda: [request.infer(parts[0], share_inputs=True, share_outputs=True)[0]]
        # Every thread computes parts of its own: faster than all threads on one part after the other.
        options |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": job["threads"]}
        queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", options), job["threads"])
        found: list[Any] = [None] * len(parts)
        queue.set_callback(lambda request, index: found.__setitem__(index, request.get_output_tensor().data.copy()))

        def run() -> list[np.ndarray]:
            for index, part in enumerate(parts):
                queue.start_async(part, index, share_inputs=True)
            queue.wait_all()
            return found

        return run

    return build


def _deepsparse(job: Job) -> Run:
    import deepsparse  # pyrefly: ignore

    inputs = list(read_inputs(job).values())
    path = Path(job["artifacts"]) / "onnx-old" / "model.onnx"
    engine = deepsparse.compile_model(str(path), batch_size=len(inputs[0]), num_cores=job["threads"])
    return lambda: [engine.run(inputs)[0]]


LONG = 0.5  # seconds: for longer runs the time to refill the caches is negligible
PRUNEOFA, REFERENCE = "pruneofa", "torch-fp32"
_TORCH = ("torch", "transformers")
_EXPORT = (*_TORCH, "onnx", "onnxscript")
_TORCH_PACKAGES, _ONNX_PACKAGES = "torch transformers", "torch transformers onnx onnxruntime onnxscript"
# What a program that uses the engine has imported; imports are not part of loading, and not of the engine's memory.
_BASE = ("numpy", "safetensors", "tokenizers", "huggingface_hub",
         "pruneofa.formats.zstd", "pruneofa.engine.engine")  # fmt: skip

_ALL = (
    Peer(PRUNEOFA, "int8", _BASE, "pruneofa", _pruneofa),
    Peer(REFERENCE, "fp32", _TORCH, _TORCH_PACKAGES, _torch_fp32, caps=_TORCH_CAPS, divides=True),
    Peer("torch-bf16", "bf16", _TORCH, _TORCH_PACKAGES, _torch_bf16, caps=_TORCH_CAPS, divides=True),
    Peer("torch-int8", "int8", _TORCH, _TORCH_PACKAGES, _torch_int8, caps=_TORCH_CAPS, divides=True),
    Peer(
        name="onnxruntime",
        kind="fp32",
        modules=("onnxruntime",),
        packages=_ONNX_PACKAGES,
        build=_onnxruntime("onnx"),
        artifact="onnx",
        makers=_EXPORT,
    ),
    Peer(
        name="onnxruntime-int8",
        kind="int8",
        modules=("onnxruntime",),
        packages=_ONNX_PACKAGES,
        build=_onnxruntime("onnx-int8"),
        artifact="onnx-int8",
        makers=_EXPORT,
    ),
    Peer(
        name="openvino",
        kind="bf16",  # on CPUs that support it
        modules=("openvino",),
        packages="torch transformers openvino",
        build=_openvino("openvino"),
        artifact="openvino",
        makers=_TORCH,
        caps=_OPENVINO_CAPS,
        divides=True,
    ),
    Peer(
        name="openvino-int8",
        kind="int8",
        modules=("openvino",),
        packages="torch transformers openvino nncf",
        build=_openvino("openvino-int8"),
        artifact="openvino-int8",
        makers=(*_TORCH, "nncf"),
        caps=_OPENVINO_CAPS,
        divides=True,
    ),
    Peer(
        name="deepsparse",
        kind="fp32",
        modules=("deepsparse",),
        packages="deepsparse, into a separate interpreter (it needs NumPy 1): --python deepsparse=FILE",
        build=_deepsparse,
        artifact="onnx-old",
        makers=_EXPORT,
        caps=_DEEPSPARSE_CAPS,
        dense=False,
    ),
)
PEERS = {peer.name: peer for peer in _ALL}


def peak_memory() -> int:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before exec
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Process:
    """The state of a process between requests."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.long: set[str] = set()

    def start(self, peer: str, job: Job) -> dict[str, Any]:
        """Import the peer's modules; memory used after this is attributed to the peer."""
        for name in PEERS[peer].modules:
            importlib.import_module(name)
        if "transformers" in PEERS[peer].modules:
            kind = json.loads((Path(job["folder"]) / "config.json").read_text())["model_type"]
            importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        if peer == PRUNEOFA:
            from tokenizers import Tokenizer

            Tokenizer.from_file(str(Path(job["packed"]) / "tokenizer.json"))
        return {"baseline": peak_memory()}

    def build(self, peer: str, job: Job) -> dict[str, Any]:
        """Load the model and run it once; returns the seconds of both."""
        start = time.perf_counter()
        run = PEERS[peer].build(job)
        loaded = time.perf_counter()
        run()
        self.runs[peer] = run
        return {"load": loaded - start, "first_answer": time.perf_counter() - start}

    def save(self, peer: str, job: Job, path: str) -> dict[str, Any]:
        """Write the output, float32 (batch, seq, hidden), as .npy."""
        np.save(path, joined(job, self.runs[peer]()))
        return {}

    def time(self, key: str, count: int) -> dict[str, Any]:
        """Seconds of `count` runs, after one warm-up run, because the other processes have evicted the caches.

        Once the runs have taken longer than LONG seconds, later calls skip the warm-up run.
        """
        run = self.runs[key]
        if key not in self.long:
            run()
        seconds: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        if min(seconds) > LONG:
            self.long.add(key)
        return {"seconds": seconds}

    def memory(self) -> dict[str, Any]:
        """Peak memory so far, in bytes."""
        return {"peak": peak_memory()}


def answer_requests(actions: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer one line of JSON, {"do": ACTION, ...arguments}, with another, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that output printed by libraries does not mix with the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("do")](**request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0][:300]
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Answer the requests of another process."""
    process = Process()
    names = ("start", "build", "save", "time", "memory")
    answer_requests({name: getattr(process, name) for name in names})


if __name__ == "__main__":
    main()
