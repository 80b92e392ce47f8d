"""Time Engine.from_pretrained, of one checkout or of two in alternation.

    python benchmarks/load_time.py FOLDER... [--checkout PATH [PATH]] [--runs 5] [--out FILE.json]

FOLDER is a model, or SHAPE@SPARSITY for random weights, such as bert-base@0.9. Every load runs in its own process. The
process first imports everything and reads the weights once, so that they are in the page cache. The record calls the
first checkout "before" and the second "after".
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import children
from checkout import check_loaded, interpreter
from machine import machine

from pruneofa.bench.random_folder import write_random

HERE = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, time, json
from pathlib import Path
from pruneofa import Engine
import pruneofa, safetensors, tokenizers
for file in Path(sys.argv[1]).glob("*.safetensors"):
    file.read_bytes()
begin, processor = time.perf_counter(), time.process_time()
Engine.from_pretrained(sys.argv[1], precision=sys.argv[2], threads=1)
print(json.dumps([time.perf_counter() - begin, time.process_time() - processor, pruneofa.__file__]))
"""


def load(checkout: Path, folder: Path, precision: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one load, in its own process."""
    command = [interpreter(checkout), "-c", PROGRAM, str(folder), precision]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall, processor, file = json.loads(found.splitlines()[-1])
    check_loaded(file, checkout)
    return wall, processor


def measure(folder: Path, precision: str, checkouts: list[Path], runs: int) -> list[dict[str, object]]:
    """One row per checkout, which take turns; the first load of each does not count."""
    times: list[list[tuple[float, float]]] = [[] for _ in checkouts]
    for _ in range(runs + 1):
        for checkout, found in zip(checkouts, times, strict=True):
            found.append(load(checkout, folder, precision))
    rows = []
    for name, found in zip(("before", "after") if len(checkouts) > 1 else ("this",), times, strict=True):
        wall, processor = zip(*found[1:], strict=True)
        rows.append(
            {
                "checkout": name,
                "median_s": round(statistics.median(wall), 4),
                "median_processor_s": round(statistics.median(processor), 4),
                "seconds": [round(value, 4) for value in wall],
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="model folders, or SHAPE@SPARSITY of random weights")
    parser.add_argument("--checkout", nargs="+", type=Path, default=[HERE], help="one or two source trees")
    parser.add_argument("--runs", type=int, default=5, help="loads that count, of each (default 5)")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    options = parser.parse_args()
    models: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.folders:
            folder, label = Path(name), Path(name).parent.name if Path(name).name == "model" else Path(name).name
            if "@" in name:
                shape, _, sparsity = name.partition("@")
                folder = Path(temporary) / shape
                write_random(folder, shape, float(sparsity), "unstructured")
            for precision in ("int8", "fp32"):
                rows = measure(folder, precision, options.checkout, options.runs)
                models[f"{label}, {precision}"] = rows
                for row in rows:
                    print(f"{label:24} {precision:5} {row['checkout']:7} {row['median_s']:7.3f} s "
                          f"({row['median_processor_s']:.3f} s of the processor)", flush=True)  # fmt: skip
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    record = {"machine": machine(), "runs": options.runs, "models": models}
                    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    children.run(main)
