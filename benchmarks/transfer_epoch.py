"""Seconds of a transfer epoch in two checkouts, which train in turns of a few steps.

    python benchmarks/transfer_epoch.py BEFORE AFTER DATA SPARSE TEACHER [--task sst2 mnli] [--steps 60] [--turn 5]
                                        [--hidden 0] [--epochs 9] [--out FILE.json]

Each checkout must be installed (`make install`). It trains in its own process by its own training loop, on the same
first rows of the task, with the pattern locked and distilled from a teacher with a random head, as the recipe minilm-90
does; no checkpoint falls into the turns. The turns alternate, so that other load on the machine affects both. CPU
seconds are of the whole process; with OMP_NUM_THREADS=1 they depend little on other load.
--hidden 0 distils logits alone, as published. A checkout that computes those of the teacher once does so before the
first turn; its seconds are divided among the steps of --epochs passes.
A ratio below 1: AFTER is faster.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import children
from checkout import check_loaded, interpreter
from machine import machine

PROGRAM = """
import json, sys, tempfile, time
from pathlib import Path
import torch, pruneofa
from transformers import TrainerCallback
from pruneofa import recipe
from pruneofa.train.models import load_for_task, load_tokenizer, set_dropout
from pruneofa.train.objective import TransferObjective
from pruneofa.train.trainer import train
try:
    from pruneofa.data.tasks import load_task
    from pruneofa.train.callbacks import LockCallback
except ImportError:  # before the rooms were divided
    from pruneofa.train.tasks import load_task
    from pruneofa.train.trainer import LockCallback

data, sparse, teacher, name, steps, turn, hidden = *sys.argv[1:5], *map(int, sys.argv[5:7]), float(sys.argv[7])
print(json.dumps(pruneofa.__file__), flush=True)

class Turns(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step % turn == 0:
            sys.stdin.readline()
            self.begun = time.perf_counter(), time.process_time()
    def on_step_end(self, args, state, control, **_):
        if state.global_step % turn == 0:
            times = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]
            print(json.dumps(times), flush=True)

spec = recipe.Task(data=data, train_rows=32 * steps, validation_rows=8)
task = load_task(name, spec, load_tokenizer(sparse))
torch.manual_seed(0)
models = [load_for_task(folder, task.kind, **task.model_kwargs()) for folder in (sparse, teacher)]
objective = TransferObjective(*models, kind=task.kind, hard=0.0, kd=1.0, hidden=hidden, temperature=2.0)
set_dropout(objective.student, 0.0)
with tempfile.TemporaryDirectory() as work:
    begun = time.perf_counter(), time.process_time()
    if not hidden:
        try:
            from pruneofa.train.teacher_logits import with_teacher_logits
        except ImportError:  # before logits were kept
            pass
        else:
            task, _ = with_teacher_logits(task, objective.teacher, Path(work), "fp32", name)
            objective.distil_from_batches()
    print(json.dumps((time.perf_counter() - begun[0], time.process_time() - begun[1])), flush=True)
    train(objective, stage=name, work=Path(work), dataset=task.train.train_dataset(32, 0, 1), collate=task.collate,
          steps=steps, batch=32, lr=3e-4, rate=lambda step: 1.0, emit=lambda event: None, precision="fp32",
          save_steps=10 * steps, callbacks=[LockCallback(), Turns()])
"""


def start(checkout: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start the training of a checkout, which waits for its first turn."""
    command = [interpreter(checkout), "-c", PROGRAM, *arguments]
    process = children.start_answering(command, stderr=subprocess.DEVNULL)
    check_loaded(children.answer(process), checkout)
    return process


def main() -> None:
    """Print seconds per epoch of both checkouts and their ratio, for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "after", "data", "sparse", "teacher"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--task", nargs="+", default=["sst2", "mnli"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turn", type=int, default=5)
    parser.add_argument("--hidden", type=float, default=1.0, help="weight of the hidden states' loss")
    parser.add_argument("--epochs", type=int, default=9, help="passes among which what is computed once is divided")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.steps % options.turn:
        sys.exit("--steps must be a multiple of --turn")
    rows = []
    for name in options.task:
        arguments = (
            options.data / name,
            options.sparse,
            options.teacher,
            name,
            options.steps,
            options.turn,
            options.hidden,
        )
        both = [start(checkout, *arguments) for checkout in (options.before, options.after)]
        once = [children.answer(process) for process in both]
        turns = [[children.ask(process, None) for process in both] for _ in range(options.steps // options.turn)]
        shares = [[seconds / options.steps / options.epochs for seconds in times] for times in once]
        sums = [
            [sum(turn[side][kind] for turn in turns) / options.steps + shares[side][kind] for side in (0, 1)]
            for kind in (0, 1)
        ]
        ratios = [after[1] / before[1] for before, after in turns]
        row = {
            "task": name, "steps": options.steps, "hidden": options.hidden, "epochs": options.epochs,
            "cpu_seconds_once": [times[1] for times in once],
            "seconds_per_step": sums[0], "cpu_seconds_per_step": sums[1],
            "ratio": sums[0][1] / sums[0][0], "cpu_ratio": sums[1][1] / sums[1][0],
            "cpu_ratio_of_turns": [min(ratios), statistics.median(ratios), max(ratios)],
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
        for process in both:
            process.communicate()
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    children.run(main)
