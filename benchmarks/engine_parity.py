"""How far the logits of the engine are from the logits of simulated int8, for a quantized folder and its task.

    python benchmarks/engine_parity.py FOLDER --task sst2 [--data PATH] [--isa amx avx2] [--rows N] [--json]

FOLDER has quantization.json, as `pruneofa quantize` writes it. Torch simulates int8 as it did in training; the engine
computes it. Printed are the relative L2 distances of the logits of every validation row (for SQuAD of every window),
the share of rows with the same class (of windows with the same likeliest start and end), and the metrics of both. Exit
code 1 if a target is missed: median 2e-3, largest 3e-2, 99.8 % equal classes, metrics within 0.2 points.

A float that differs in its last bit may be rounded to the next code. If the logits of a row are nearly 0, that changes
them by more than their size. So the first line compares torch with itself, one row at a time instead of in batches:
there only the order of additions differs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from pruneofa import recipe
from pruneofa.data.features import TaskData
from pruneofa.data.tasks import Task, load_task, longest_input
from pruneofa.engine.engine import Engine
from pruneofa.formats import scales
from pruneofa.train import evaluate
from pruneofa.train.models import load_tokenizer
from pruneofa.train.quantize import FakeQuantizer

MEDIAN, LARGEST, EQUAL, POINTS = 2e-3, 3e-2, 99.8, 0.2
Forward = Callable[[TaskData], Iterator[evaluate.Batch]]


class Recorded:
    """The logits of each split, recorded while the metrics are computed from them.

    Attributes:
        logits: for each split {row: [(classes,)], or [(tokens,), (tokens,)] for start and end}.
    """

    def __init__(self, forward: Forward, task: Task, columns: list[int] | None) -> None:
        self._forward = forward
        self.logits: list[dict[int, list[np.ndarray]]] = []
        with torch.no_grad():
            self.metrics = evaluate._metrics(task, columns, self._batches).values

    def _batches(self, data: TaskData) -> Iterator[evaluate.Batch]:
        found = {}
        for rows, heads in self._forward(data):
            for place, row in enumerate(rows):
                count = int(data.lengths[row]) if data.windows is not None else None  # the rest is padding
                found[int(row)] = [np.asarray(head[place], np.float64)[:count] for head in heads]
            yield rows, heads
        self.logits.append(found)


def compare(computed: Recorded, simulated: Recorded) -> dict[str, Any]:
    """Distances of the logits, equal classes, and both metrics."""
    distances, equal = [], []
    for found_logits, wanted in zip(computed.logits, simulated.logits, strict=True):
        for row, heads in wanted.items():
            a, b = np.concatenate(found_logits[row]), np.concatenate(heads)
            distances.append(np.linalg.norm(a - b) / np.linalg.norm(b))
            equal.append(all(x.argmax() == y.argmax() for x, y in zip(found_logits[row], heads, strict=True)))
    points = max(abs(computed.metrics[name] - wanted) for name, wanted in simulated.metrics.items())
    found = {"rows": len(distances), "median": float(np.median(distances)), "p99": float(np.quantile(distances, 0.99)),
             "largest": float(max(distances)), "within_1e-5": 100 * float(np.mean(np.array(distances) < 1e-5)),
             "equal": 100 * float(np.mean(equal)), "metrics": computed.metrics}  # fmt: skip
    missed = {"median": found["median"] > MEDIAN, "largest": found["largest"] > LARGEST,
              "equal": found["equal"] < EQUAL, "metrics": points > POINTS}  # fmt: skip
    return found | {"missed": [name for name, is_so in missed.items() if is_so]}


def measure(folder: Path, task: Task, model: torch.nn.Module, isas: list[str], threads: int | None) -> dict[str, Any]:
    """The result of `compare` for torch against itself and for every instruction set, by name."""
    columns = evaluate.label_order(model.config, task) if task.kind == "classification" else None

    def torch_in(batch: int) -> Recorded:
        return Recorded(lambda data: evaluate._forward(model, task, data, batch, "fp32", task.name), task, columns)

    simulated = torch_in(64)
    found = {"torch, one row at a time": compare(torch_in(1), simulated)}
    for isa in isas:
        engine = Engine.from_pretrained(folder, isa=isa, threads=threads)
        computed = Recorded(lambda data, engine=engine: evaluate._engine_forward(engine, task, data), task, columns)
        found[isa] = compare(computed, simulated)
    return {"simulated": simulated.metrics, "against": found}


def main() -> None:
    """Print one line for each path, or everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", help="of the task, as in a recipe (default: the hub's)")
    parser.add_argument("--isa", nargs="+", default=Engine.available_isas())
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=int, help="only the first rows of the validation data")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quantization = scales.read(options.folder)
    if quantization is None:
        sys.exit(f"{options.folder}: not quantized; make such a folder with: pruneofa quantize")
    model = evaluate.load_task_model(options.folder, "qa" if options.task == "squad" else "classification")
    FakeQuantizer.of(model, quantization)
    spec = recipe.Task(data=options.data, validation_rows=options.rows)
    tokenizer = load_tokenizer(options.folder)
    task = load_task(options.task, spec, tokenizer, train=False, max_positions=longest_input(model.config))
    found = measure(options.folder, task, model, options.isa, options.threads)
    if options.json:
        print(json.dumps({"machine": machine(), "folder": str(options.folder), "task": options.task, **found}))
    else:
        kind = "dynamic" if quantization.input_activations.dynamic else "static"
        metrics = ", ".join(f"{name} {value:.2f}" for name, value in found["simulated"].items())
        print(f"{options.task}, {kind} activations, simulated: {metrics}")
        for name, row in found["against"].items():
            metrics = ", ".join(f"{value:.2f}" for value in row["metrics"].values())
            missed = f"  MISSED: {', '.join(row['missed'])}" if row["missed"] else ""
            print(f"{name:>24}: {row['rows']} rows, median {row['median']:.1e}, p99 {row['p99']:.1e}, largest "
                  f"{row['largest']:.1e}, equal {row['equal']:.2f} %, metrics {metrics}{missed}")  # fmt: skip
    sys.exit(any(row["missed"] for name, row in found["against"].items() if name in options.isa))


if __name__ == "__main__":
    main()
