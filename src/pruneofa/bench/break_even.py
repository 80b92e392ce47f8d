"""Break-even sparsity on this machine, per layer shape: pruneofa's sparse kernel against the best dense int8."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.bench.measure import Bench
from pruneofa.bench.models import Model
from pruneofa.bench.peers import PEERS, PRUNEOFA
from pruneofa.bench.random_folder import prune
from pruneofa.bench.workers import Worker, WorkerError
from pruneofa.errors import CheckFailed
from pruneofa.progress import progress

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
DENSE = "torch-int8"
ONE_LAYER = f"{DENSE}, one layer"  # the one-layer peer is independent of the peer that runs whole models
_ROUNDS = 10
_TOLERANCE = 0.05  # relative L2 of a product, against float64


def break_even(bench: Bench, model: Model, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row per shape and number of tokens: microseconds on one thread, of pruneofa by sparsity and of the peer.

    "pays_from" is the lowest sparsity from which pruneofa is faster than the dense peer; None if there is no such
    sparsity or no peer. Weights are random. Each product is verified before it is timed: a
    peer's wrong one leaves it out, ours raises CheckFailed.
    """
    shapes = sorted({tensor.shape for tensor in model.linears})
    dense = PEERS[DENSE]
    with tempfile.TemporaryDirectory(prefix="pruneofa-bench-") as temporary, contextlib.ExitStack() as stack:
        root = Path(temporary)
        job = {"folder": str(model.folder.absolute()), "packed": str(model.packed.absolute())}
        workers: dict[str, Worker] = {}
        for peer in (PEERS[PRUNEOFA], dense):
            if not peer.missing() and (bench.cap is None or bench.cap in peer.caps or peer.name == PRUNEOFA):
                worker = stack.enter_context(bench.worker(peer, root, here=True, program="one_layer"))
                with _tried(bench, peer.name):
                    worker.ask("start", peer=peer.name, job=job)
                    workers[peer.name] = worker
        with progress("break-even", len(shapes) * len(tokens)) as advance:
            for shape in shapes:
                for count in tokens:
                    if ONE_LAYER in bench.left_out:
                        workers.pop(dense.name, None)
                    yield _row(bench, workers, shape, count, root, advance)


def _row(
    bench: Bench, workers: dict[str, Worker], shape: tuple[int, ...], tokens: int, root: Path,
    advance: Callable[..., None],
) -> dict[str, Any]:  # fmt: skip
    random = np.random.default_rng(0)
    full = random.standard_normal(shape, np.float32) * np.float32(0.02)
    x = random.standard_normal((tokens, shape[1]), np.float32)
    keys: list[tuple[str, str]] = []
    for peer, sparsity in [*((PRUNEOFA, s) for s in SPARSITIES), (DENSE, 0.0)]:
        if peer not in workers:
            continue
        key, file = f"{peer} {sparsity:g}", root / "layer.npz"
        weight = prune(full, sparsity, "unstructured")
        np.savez(file, weight=weight, x=x)
        with _tried(bench, peer):
            workers[peer].ask("layer", key=key, job={"peer": peer, "inputs": str(file), "isa": bench.isa})
            _verify(workers[peer], key, x.astype(np.float64) @ weight.T.astype(np.float64), root)
            keys.append((peer, key))
    seconds: dict[str, list[float]] = {key: [] for _, key in keys}
    count = math.ceil(bench.settings.repeats / _ROUNDS)
    for turn in range(_ROUNDS):
        shift = turn % len(keys)
        for peer, key in keys[shift:] + keys[:shift]:
            if peer == PRUNEOFA or ONE_LAYER not in bench.left_out:
                with _tried(bench, peer):
                    seconds[key] += workers[peer].ask("time", key=key, count=count)["seconds"]
    keys = [(peer, key) for peer, key in keys if peer == PRUNEOFA or ONE_LAYER not in bench.left_out]
    for peer, key in keys:
        workers[peer].ask("forget", key=key)
    advance(note=f"{shape[0]}x{shape[1]}")
    median = {key: 1e6 * float(np.median(seconds[key])) for _, key in keys}
    engine = {f"{s:g}": median[f"{PRUNEOFA} {s:g}"] for s in SPARSITIES}
    dense = median.get(f"{DENSE} 0")
    return {"shape": list(shape), "tokens": tokens, "ours_us": engine, "dense_us": dense, "dense": dense and DENSE,
            "pays_from": pays_from(engine, dense)}  # fmt: skip


def _tried(bench: Bench, peer: str) -> contextlib.AbstractContextManager[None]:
    return bench.tried(PRUNEOFA if peer == PRUNEOFA else ONE_LAYER, "break-even", fatal=peer == PRUNEOFA)


def _verify(worker: Worker, key: str, wanted: np.ndarray, root: Path) -> None:
    path = root / "product.npy"
    worker.ask("save", key=key, path=str(path))
    error = float(np.linalg.norm(np.load(path) - wanted) / np.linalg.norm(wanted))
    if not error <= _TOLERANCE:
        kind = CheckFailed if key.startswith(PRUNEOFA) else WorkerError  # a peer is left out, and the record says why
        raise kind(f"one layer, {key}: error {error:.3g}, wanted at most {_TOLERANCE}; it was not timed")


def pays_from(engine: dict[str, float], dense: float | None) -> float | None:
    """The lowest sparsity at which, and at all higher ones, pruneofa is faster than dense; None if there is none."""
    least = None
    for sparsity in sorted(engine, key=float, reverse=True):
        if dense is None or engine[sparsity] >= dense:
            break
        least = float(sparsity)
    return least
