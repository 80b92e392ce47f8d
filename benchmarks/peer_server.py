"""Peers of `pruneofa serve`: how each is started, and sentence-transformers behind FastAPI.

`serve_peers.py` imports this, and runs it in the venv of sentence-transformers:

    PYTHON peer_server.py make DIR < texts.json  # ONNX and OpenVINO files from DIR/torch
    PYTHON peer_server.py encode DIR BACKEND ... < texts.json  # vectors, computed without a server, by backend
    PYTHON peer_server.py serve DIR BACKEND --port 8000

DIR/torch is a sentence-transformers folder; nothing of pruneofa is needed there. The server gives all requests that
wait to one call of `encode`, which sorts the texts by length and cuts them into batches.
"""

import argparse
import asyncio
import json
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

# Backend: folder below DIR, file, runtime.
BACKENDS = {
    "torch": ("torch", "", "torch"),
    "onnx": ("onnx", "model_optimized.onnx", "onnx"),
    "onnx-int8": ("onnx-int8", "model_quantized.onnx", "onnx"),
    "openvino": ("openvino", "openvino_model.xml", "openvino"),
    "openvino-int8": ("openvino-int8", "openvino_model.xml", "openvino"),
}
# Name: folder below DIR and options of infinity. BetterTransformer has no linear layers that it could quantize.
INFINITY = {
    "infinity-torch": ("torch", "--engine", "torch", "--dtype", "float32", "--bettertransformer"),
    "infinity-torch-int8": ("torch", "--engine", "torch", "--dtype", "int8", "--no-bettertransformer"),
    "infinity-onnx": ("onnx", "--engine", "optimum"),
    "infinity-onnx-int8": ("onnx-int8", "--engine", "optimum"),
}
PEERS = [*INFINITY, *(f"st-{backend}" for backend in BACKENDS)]
_WAITING = 256  # texts of the requests that one call of `encode` takes


def prepare(model: str, tokenizer: Path | None, work: Path, python: str, calibration: list[str]) -> None:
    """Make the folders that are not in `work` yet."""
    from pruneofa.bench.random_folder import write_random

    plain, packed = work / "torch", work / "packed"
    if not plain.exists() and "@" in model:
        shape, _, sparsity = model.partition("@")
        if tokenizer is None:
            raise SystemExit("random weights need --tokenizer, a sentence-transformers folder")
        write_random(plain, shape, float(sparsity))
        for file in tokenizer.glob("**/*.json"):
            if file.name != "config.json" or file.parent != tokenizer:
                (plain / file.relative_to(tokenizer)).parent.mkdir(exist_ok=True)
                shutil.copy(file, plain / file.relative_to(tokenizer))
        pooling = next(plain.glob("*_Pooling/config.json"))
        settings = json.loads(pooling.read_text(encoding="utf-8"))
        settings["word_embedding_dimension"] = json.loads((plain / "config.json").read_text())["hidden_size"]
        pooling.write_text(json.dumps(settings), encoding="utf-8")
    elif not plain.exists():
        shutil.copytree(model, plain)
    if not packed.exists():
        subprocess.run([sys.executable, "-m", "pruneofa", "pack", str(plain), str(packed)], check=True)
    if not (work / "openvino-int8" / "openvino_model.bin").exists():
        run(python, "make", str(work), texts=calibration)


def command(
    name: str, python: str, folder: Path, port: int, threads: int, batch: int
) -> tuple[list[str], dict[str, str]]:
    """The command that starts a peer, and its environment variables."""
    if name in INFINITY:
        below, *settings = INFINITY[name]
        words = [str(Path(python).parent / "infinity_emb"), "v2", "--device", "cpu", "--host", "127.0.0.1",
                 "--model-id", str(folder / below), "--served-model-name", "model", "--pooling-method", "mean",
                 "--no-trust-remote-code", "--no-model-warmup",
                 "--log-level", "warning", "--batch-size", str(batch), *settings]  # fmt: skip
    else:
        words = [python, __file__, "serve", str(folder), name.removeprefix("st-"),
                 "--threads", str(threads), "--batch", str(batch)]  # fmt: skip
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        "DO_NOT_TRACK": "1",
        "INFINITY_ONNX_DISABLE_OPTIMIZE": "1",  # the files are optimized already
    }
    return [*words, "--port", str(port)], variables


def run(python: str, *arguments: str, texts: list[str]) -> str:
    """Standard output of this program, run by another interpreter."""
    words = [python, __file__, *arguments]
    return subprocess.run(words, input=json.dumps(texts), stdout=subprocess.PIPE, text=True, check=True).stdout


def load(folder: Path, backend: str, threads: int) -> Any:
    """The model of one backend."""
    from sentence_transformers import SentenceTransformer

    name, file, runtime = BACKENDS[backend]
    kind: Any = runtime
    options: dict[str, Any] = {}
    if runtime == "torch":
        import torch

        torch.set_num_threads(threads)
    elif runtime == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads, session.inter_op_num_threads = threads, 1
        options = {"file_name": file, "provider": "CPUExecutionProvider", "session_options": session}
    else:
        limits = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1"}
        options = {"file_name": file, "ov_config": limits}
    return SentenceTransformer(
        str(folder / name),
        backend=kind,
        device="cpu",
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs=options,
    )


def encode(model: Any, texts: list[str], batch: int) -> Any:
    """Vectors of length 1, (texts, hidden) float32."""
    return model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)


def make(folder: Path, texts: list[str]) -> None:
    """Export, optimize and quantize DIR/torch in the ways that sentence-transformers' documentation recommends."""
    make_onnx(folder)
    make_openvino(folder, texts)


def _copy(folder: Path, name: str) -> Path:
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "torch", target)
    return target


def make_onnx(folder: Path) -> None:
    """ONNX with fused layers (O2), and dynamic int8 of it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTOptimizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig

    fused, int8 = _copy(folder, "onnx"), _copy(folder, "onnx-int8")
    plain = ORTModelForFeatureExtraction.from_pretrained(folder / "torch", export=True, trust_remote_code=False)
    ORTOptimizer.from_pretrained(plain).optimize(AutoOptimizationConfig.O2(), fused)
    # What export_dynamic_quantized_onnx_model(..., "avx2") does; it cannot infer the types of fused layers.
    types = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    source, target = fused / "model_optimized.onnx", int8 / "model_quantized.onnx"
    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8, extra_options=types)


def make_openvino(folder: Path, texts: list[str]) -> None:
    """OpenVINO, and int8 by post-training quantization, calibrated on the texts."""
    import nncf
    import openvino
    from optimum.intel import OVModelForFeatureExtraction
    from transformers import AutoTokenizer

    target, int8 = _copy(folder, "openvino"), _copy(folder, "openvino-int8")
    plain = OVModelForFeatureExtraction.from_pretrained(folder / "torch", export=True, trust_remote_code=False)
    plain.save_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "torch", trust_remote_code=False)
    model = openvino.Core().read_model(target / "openvino_model.xml")
    names = {name for value in model.inputs for name in value.names}
    samples = [
        {name: array for name, array in tokenizer(text, truncation=True, max_length=256, return_tensors="np").items()
         if name in names}
        for text in texts
    ]  # fmt: skip
    quantized = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples),
                              model_type=nncf.ModelType.TRANSFORMER)  # fmt: skip
    openvino.save_model(quantized, int8 / "openvino_model.xml", compress_to_fp16=False)


class Batches:
    """One thread that encodes the texts of all waiting requests together."""

    def __init__(self, model: Any, batch: int) -> None:
        self._model, self._batch = model, batch
        self._waiting: queue.SimpleQueue[tuple[list[str], asyncio.Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    async def encode(self, texts: list[str]) -> Any:
        """Vectors of one request."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.put((texts, future))
        return await future

    def _run(self) -> None:
        while True:
            taken = [self._waiting.get()]
            while sum(len(texts) for texts, _ in taken) < _WAITING and not self._waiting.empty():
                taken.append(self._waiting.get())
            vectors = encode(self._model, [text for texts, _ in taken for text in texts], self._batch)
            for texts, future in taken:
                own, vectors = vectors[: len(texts)], vectors[len(texts) :]
                future.get_loop().call_soon_threadsafe(_finish, future, own)


def _finish(future: "asyncio.Future[Any]", vectors: Any) -> None:
    if not future.done():
        future.set_result(vectors)


def serve(model: Any, port: int, batch: int) -> None:
    """POST /embed {"inputs": text or texts} gives a list of vectors, as in text-embeddings-inference."""
    import orjson
    import uvicorn
    from fastapi import FastAPI, Response
    from pydantic import BaseModel

    class Body(BaseModel):
        inputs: str | list[str]

    app, batches = FastAPI(), Batches(model, batch)

    @app.post("/embed")
    async def embed(body: Body) -> Response:
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        vectors = await batches.encode(texts)
        return Response(orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def main() -> None:
    """Make files, encode or serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "encode", "serve"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("backends", nargs="*", choices=list(BACKENDS), metavar="BACKEND")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="texts that a model computes together (default 32)")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if options.action == "make":
        make(options.folder, json.load(sys.stdin))
    elif options.action == "encode":
        texts = json.load(sys.stdin)
        models = {name: load(options.folder, name, options.threads) for name in options.backends}
        json.dump({name: encode(model, texts, 1).tolist() for name, model in models.items()}, sys.stdout)
    else:
        serve(load(options.folder, options.backends[0], options.threads), options.port, options.batch)


if __name__ == "__main__":
    main()
