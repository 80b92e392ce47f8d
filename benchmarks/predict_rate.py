"""Rows per second and memory of `pruneofa predict`, beside the engine alone on the same texts.

    python benchmarks/predict_rate.py [--model FOLDER] [--rows N] [--alone N] [--threads 2] [--rounds 3] [--out FILE]

Without --model: random weights of MiniLM at sparsity 0.9. Texts have 4 to 30 words. The engine alone gets lists of the
same texts, 512 at a time, already in memory: all, or the first N, before and after `predict`, which reads and writes
CSV in a process of its own; its rate is taken from the first part on, so that neither counts the start. On a busy
machine the processor seconds per row are the fairer ratio, with one thread.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import children
import numpy as np
from machine import machine

from pruneofa import Engine
from pruneofa.bench.random_folder import write_random

PART = 1024


def write_texts(file: Path, rows: int) -> list[str]:
    """Write a CSV file of random words, and return its texts."""
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in random.integers(0, 30_000, random.integers(4, 31))) for _ in range(rows)]
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))
    return texts


def engine_rate(model: Path, texts: list[str], threads: int) -> tuple[float, float]:
    """Texts per second, and per second of processor time, of `Engine.predict`."""
    engine = Engine.from_pretrained(model, threads=threads)
    engine.predict(texts[:PART], batch_size=512)
    begin, processor = time.perf_counter(), time.process_time()
    for start in range(PART, len(texts), PART):
        engine.predict(texts[start : start + PART], batch_size=512)
    count = len(texts) - PART
    return count / (time.perf_counter() - begin), count / (time.process_time() - processor)


def predict_rate(model: Path, file: Path, threads: int) -> tuple[float, float, list[int]]:
    """Rows per second, and per second of processor time, from the first part to the output; resident memory in MB."""
    out = file.with_name("out.csv")
    command = [sys.executable, "-m", "pruneofa", "predict", str(model), str(file), "--out", str(out), "--redo"]
    process = children.start([*command, "--rows", PART, "--threads", threads], stdout=subprocess.DEVNULL)
    begin, spent, last, memory = 0.0, 0.0, 0.0, []
    while process.poll() is None:
        time.sleep(0.02)
        if not begin and any(file.parent.glob(".out.csv.*.parts/[0-9]*.csv")):
            begin, spent = time.perf_counter(), processor_seconds(process.pid)
        if begin:
            memory.append(resident(process.pid))
            last = max(last, processor_seconds(process.pid))
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit(process.returncode)
    with open(file, newline="", encoding="utf-8") as given, open(out, newline="", encoding="utf-8") as found:
        count = 0
        for row, result in zip(csv.reader(given), csv.reader(found), strict=True):
            if result[:2] != row:
                sys.exit(f"row {count} of the output is not that of the input")
            count += 1
    count -= 1 + PART
    return count / seconds, count / (last - spent), [value for value in memory if value]


def processor_seconds(pid: int) -> float:
    """User and system time of a process; 0 if it has just ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Resident memory in MB; 0 if the process has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (FileNotFoundError, IndexError, ProcessLookupError):
        return 0


def main() -> None:
    """Alternate both, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--alone", type=int, metavar="N", help="texts that the engine alone gets; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if min(options.rows, options.alone or options.rows) <= PART:
        parser.error(f"--rows and --alone must be more than the {PART} that do not count")
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or Path(temporary) / "model"
        if options.model is None:
            write_random(model, "minilm", 0.9)
        texts = write_texts(Path(temporary) / "in.csv", options.rows)
        rounds: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            some = texts[: options.alone]
            before = engine_rate(model, some, options.threads)
            files, files_processor, memory = predict_rate(model, Path(temporary) / "in.csv", options.threads)
            after = engine_rate(model, some, options.threads)
            alone, alone_processor = map(statistics.harmonic_mean, zip(before, after, strict=True))
            rounds.append(
                {
                    "engine_rows_per_second": round(alone, 1),
                    "predict_rows_per_second": round(files, 1),
                    "ratio": round(files / alone, 3),
                    "ratio_by_processor_time": round(files_processor / alone_processor, 3),
                    "memory_mb": {
                        name: statistics.median(part)
                        for name, part in (
                            ("first_tenth", memory[: len(memory) // 10]),
                            ("last_tenth", memory[-(len(memory) // 10) :]),
                        )
                    },
                }
            )
            print(json.dumps(rounds[-1]), flush=True)
        record: dict[str, Any] = {"machine": machine()}
        record |= {"arguments": {k: str(v) for k, v in vars(options).items()}, "rounds": rounds}
        for ratio in ("ratio", "ratio_by_processor_time"):
            record[f"median_{ratio}"] = statistics.median(row[ratio] for row in rounds)
    text = json.dumps(record, indent=2) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    children.run(main)
