"""Latency of one sequence for several models of the same shape, each in its own process."""

import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.bench.figures import statistics
from pruneofa.bench.machine import machine
from pruneofa.bench.measure import ROUNDS, SETTLE, Bench
from pruneofa.bench.models import Case, Settings
from pruneofa.bench.peers import PEERS, REFERENCE
from pruneofa.bench.workers import Worker
from pruneofa.progress import progress

REPEATS = 30


@dataclass(frozen=True)
class Runner:
    """A model to time: its folder, the name of one of `PEERS`, and the precision if that is pruneofa."""

    name: str
    folder: Path
    peer: str
    precision: str = "fp32"


def latency(runners: Sequence[Runner], *, tokens: int, vocabulary: int, repeats: int = REPEATS) -> dict[str, Any]:
    """{"setting": ..., name: {"median_ms", "p10_ms", "p90_ms"}} of one sequence of `tokens` random tokens.

    The processes alternate, as in `pruneofa bench`. Unlike there, outputs are not verified. Raises WorkerError.
    """
    bench = Bench(Settings(peers=(REFERENCE,), repeats=repeats))
    rounds = min(ROUNDS, repeats)
    with tempfile.TemporaryDirectory(prefix="pruneofa-bench-") as temporary, contextlib.ExitStack() as stack:
        root = Path(temporary)
        inputs: dict[str, Any] = dict(Case("", (tokens,)).inputs(vocabulary, 0))
        np.savez(root / "inputs.npz", **inputs)
        workers: list[tuple[Runner, Worker]] = []
        advance = stack.enter_context(progress(f"timing one sequence of {tokens} tokens", len(runners) * (1 + rounds)))
        for runner in runners:
            folder = str(runner.folder.absolute())
            job = {"folder": folder, "packed": folder, "inputs": str(root / "inputs.npz"), "threads": bench.threads,
                   "isa": bench.isa, "precision": runner.precision}  # fmt: skip
            worker = stack.enter_context(bench.worker(PEERS[runner.peer], root))
            for step in ("start", "build"):
                worker.ask(step, peer=runner.peer, job=job)
            workers.append((runner, worker))
            advance()
        seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
        for _ in range(rounds):
            for runner, worker in workers:
                time.sleep(SETTLE)
                count = math.ceil(repeats / rounds)
                seconds[runner.name] += worker.ask("time", key=runner.peer, count=count)["seconds"]
                advance()
    setting = {"batch": 1, "tokens": tokens, "threads": bench.threads, "isa": bench.isa, "repeats": repeats}
    found: dict[str, Any] = {"setting": setting | {"cpu": machine()["cpu"]}}
    for name, runs in seconds.items():
        found[name] = {key: round(value, 4) for key, value in statistics(runs).items() if key != "seconds"}
    return found
