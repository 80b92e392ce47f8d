"""Compare the speed of the engine in two checkouts, and check that their outputs are bit-identical.

    python benchmarks/old_new.py BEFORE AFTER [--model minilm@0.9 ...] [--precision int8 ...] [--out FILE.json]

Each checkout must be installed (`make install`). It runs in its own process, with the same random weights and inputs.
The two alternate, one call each, in random order, so that other load on the machine affects both. The figure is the
median over the turns of time before / time after: 1 is equal, below 1 the second checkout is slower.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import children
from checkout import check_loaded, interpreter
from machine import machine

from pruneofa.bench.random_folder import write_random

PROGRAM = """
import hashlib, json, sys, time
import numpy as np, pruneofa
from pruneofa import Engine
folder, precision, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine = Engine.from_pretrained(folder, precision=precision, threads=threads)
clock = getattr(time, sys.argv[4])
print(json.dumps(pruneofa.__file__), flush=True)
for line in sys.stdin:
    batch, tokens = json.loads(line)
    ids = np.random.default_rng(0).integers(5, 500, (batch, tokens))
    begin = clock()
    states = engine.encode(ids)
    seconds = clock() - begin
    print(json.dumps([seconds, hashlib.sha256(states).hexdigest()]), flush=True)
"""


def start(checkout: Path, folder: Path, precision: str, threads: int, clock: str) -> subprocess.Popen[str]:
    """Start a process that loads the engine of this checkout and times one call per line of its standard input."""
    command = [interpreter(checkout), "-c", PROGRAM, folder, precision, threads, clock]
    process = children.start_answering(command)
    check_loaded(children.answer(process), checkout)
    return process


def measure(pair: list[subprocess.Popen[str]], batch: int, tokens: int, turns: int) -> dict[str, object]:
    """One row; the first three turns do not count."""
    times: list[list[float]] = [[], []]
    order, digests = [0, 1], set()
    for _ in range(turns + 3):
        random.shuffle(order)
        for which in order:
            seconds, digest = children.ask(pair[which], [batch, tokens])
            times[which].append(seconds)
            digests.add(digest)
    before, after = times[0][3:], times[1][3:]
    return {
        "batch": batch,
        "tokens": tokens,
        "turns": turns,
        "before_ms": round(1e3 * statistics.median(before), 3),
        "after_ms": round(1e3 * statistics.median(after), 3),
        "before_over_after": round(statistics.median(b / a for b, a in zip(before, after, strict=True)), 4),
        "fastest_before_over_after": round(min(before) / min(after), 4),
        "same_bits": len(digests) == 1,
    }


def main() -> None:
    """Measure every model, precision and shape; exit 1 if any answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--model", nargs="+", default=["minilm@0.9", "bert-base@0.9", "bert-base@0"])
    parser.add_argument("--precision", nargs="+", default=["int8", "fp32"])
    parser.add_argument("--shape", nargs="+", default=["1x32", "1x128", "1x384", "8x64"], help="sequences x tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument(
        "--clock",
        choices=["perf_counter", "process_time"],
        default="perf_counter",
        help="process_time: CPU time of all threads, for one thread on a machine that others use",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for model in args.model:
        shape, _, sparsity = model.partition("@")
        with tempfile.TemporaryDirectory() as folder:
            write_random(Path(folder), shape, float(sparsity or 0))
            for precision in args.precision:
                pair = [
                    start(checkout, Path(folder), precision, args.threads, args.clock)
                    for checkout in (args.before, args.after)
                ]
                for batch, tokens in (map(int, text.split("x")) for text in args.shape):
                    row = {"model": model, "precision": precision} | measure(pair, batch, tokens, args.turns)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if args.out:
                        record = {"machine": machine(), "threads": args.threads, "clock": args.clock, "rows": rows}
                        args.out.write_text(json.dumps(record, indent=1) + "\n")
                for process in pair:
                    children.dismiss(process)
    sys.exit(0 if all(row["same_bits"] for row in rows) else 1)


if __name__ == "__main__":
    children.run(main)
