"""Milliseconds of one engine by threads and lanes in one alternating run, and what waiting costs where CPUs are few.

    python benchmarks/lanes.py [--model minilm@0.9] [--threads 1 2 16] [--turns 20] [--lanes 1 2] [--before CHECKOUT]
                               [--case "1x32" ...] [--pause 0.05] [--out FILE.json]

Cases: one text of 32, of 128 and of 384 tokens, and 32 and 256 texts of 8 to 128 tokens, which are timed by numbers of
lanes, too; then one text and the 32 with the process pinned to one CPU. Every setting is an engine in a process of its
own; they take turns, one call each, in random order, so that what else runs on the machine meets all. `--before` adds
the engine of another checkout, which has been installed (`make install`). `--pause`: seconds of rest before each call,
as between the requests of a server. Times of a busy machine are only good for ratios within a row;
the load is recorded.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import children
from checkout import check_loaded, interpreter
from machine import machine

from pruneofa.bench.random_folder import write_random

PROGRAM = """
import json, os, sys, time
import numpy as np, pruneofa
from pruneofa import Engine
folder, settings = sys.argv[1], json.loads(sys.argv[2])
engine = Engine.from_pretrained(folder, **settings)
allowed = os.sched_getaffinity(0)
print(json.dumps(pruneofa.__file__), flush=True)
for line in sys.stdin:
    batch, low, high, cpus = json.loads(line)
    draw = np.random.default_rng(0)
    lengths = np.sort(draw.integers(low, high + 1, batch))
    ids = draw.integers(5, 500, (batch, high))
    mask = np.arange(high) < lengths[:, None]
    mine = set(sorted(allowed)[: cpus or None])
    for task in os.listdir("/proc/self/task"):  # threads that run already, too
        os.sched_setaffinity(int(task), mine)
    begin = time.perf_counter()
    engine.encode(ids, mask)
    print(json.dumps(time.perf_counter() - begin), flush=True)
"""

# Sequences, fewest and most tokens of one, and CPUs (0: all).
CASES = {
    "1x32": [1, 32, 32, 0],
    "1x128": [1, 128, 128, 0],
    "1x384": [1, 384, 384, 0],
    "32x8-128": [32, 8, 128, 0],
    "256x8-128": [256, 8, 128, 0],
    "1x32 on one CPU": [1, 32, 32, 1],
    "32x8-128 on one CPU": [32, 8, 128, 1],
}


class Runner:
    """A process that times one call for each line it is sent."""

    def __init__(self, label: str, checkout: Path | None, folder: Path, **settings: int) -> None:
        """Load the engine, of another checkout if one is given."""
        self.label = label
        python = sys.executable if checkout is None else interpreter(checkout)
        command = [python, "-c", PROGRAM, str(folder), json.dumps(settings)]
        self.process = children.start_answering(command)
        file = children.answer(self.process)
        if checkout is not None:
            check_loaded(file, checkout)

    def call(self, case: list[int]) -> float:
        """Seconds of one call."""
        return children.ask(self.process, case)


def measure(runners: list[Runner], case: list[int], turns: int, pause: float) -> dict[str, dict[str, float]]:
    """Median and least milliseconds by label, of calls after `pause` seconds of rest; the first turn does not count."""
    times: dict[str, list[float]] = {runner.label: [] for runner in runners}
    for _ in range(turns + 1):
        random.shuffle(runners)
        for runner in runners:
            time.sleep(pause)
            times[runner.label].append(1e3 * runner.call(case))
    return {
        label: {"median": round(statistics.median(found[1:]), 3), "least": round(min(found[1:]), 3)}
        for label, found in sorted(times.items())
    }


def main() -> None:
    """Measure every case and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm@0.9")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 16])
    parser.add_argument("--lanes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit, installed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape, _, sparsity = args.model.partition("@")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random(folder, shape, float(sparsity or 0))
        runners = [Runner(f"{count} threads", None, folder, threads=count) for count in args.threads]
        if args.before:
            runners += [
                Runner(f"before, {count} threads", args.before, folder, threads=count) for count in args.threads
            ]
        by_lanes = [
            Runner(f"{count} threads, {lanes} lanes", None, folder, threads=count, lanes=lanes)
            for count in args.threads
            for lanes in args.lanes
            if count > 1 and lanes <= count
        ]
        cpus = len(os.sched_getaffinity(0))
        for name in args.case:
            case = CASES[name]
            batch, pinned = case[0], case[3]
            some = runners if batch == 1 or pinned else runners + by_lanes
            load = os.getloadavg()[0]
            row: dict[str, object] = {
                "case": name,
                "cpus": pinned or cpus,
                "turns": args.turns,
                "pause": args.pause,
                "load_average": round(load, 2),
                "ms": measure(list(some), case, args.turns, args.pause),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                record = {"machine": machine(), "model": args.model, "rows": rows}
                args.out.write_text(json.dumps(record, indent=1) + "\n")
        for runner in runners + by_lanes:
            children.dismiss(runner.process)


if __name__ == "__main__":
    children.run(main)
