"""Prune one model by several scores with the same text and tokens, and print what each loses.

    python results/score_table.py OUT --model DENSE --text wiki/ --arms magnitude obs/global hessian/uniform/relative
    python results/score_table.py OUT --model DENSE --text wiki/ --steps 3000 --tasks sst2 qnli --data-root DATA

An arm is SCORE[/SCOPE[/LOSS[/TIME]]]: score of prune.score; uniform or global; hidden, relative (hidden states, each
layer's error divided by its teacher's size) or logits (kd 1, which needs a model with a trained head); once or gradual,
pruned before training or during it, by default as the score does it. With --steps 0 every arm is pruned at once. The
same command resumes, and skips arms that are done. OUT/table.json has the settings and the rows: errors are those of
hidden states on held-out text, mean over layers, as they are and relative to the teacher's size; accuracy is that of
fine-tuning with the labels alone.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pruneofa import recipe
from pruneofa.errors import InputError
from pruneofa.formats.files import read_json, write_json
from pruneofa.run import single
from pruneofa.run.inputs import Inputs
from pruneofa.run.pretraining import PruneSettings, student_objective, validate
from pruneofa.run.results import hardware, versions
from pruneofa.run.stage import RECORD
from pruneofa.train.device import fast_precision, processes
from pruneofa.train.models import load_for_pretraining
from pruneofa.train.objective import PretrainingObjective

TIMES = {"once": True, "gradual": False}
LOSSES: dict[str, dict[str, Any]] = {
    "hidden": {"hard": 0.0, "kd": 0.0, "hidden": 1.0},
    "relative": {"hard": 0.0, "kd": 0.0, "hidden": 1.0, "hidden_norm": True},
    "logits": {"hard": 0.0, "kd": 1.0},
}


def arm_recipe(arm: str, options: argparse.Namespace) -> recipe.Recipe:
    """The recipe of one arm."""
    score, scope, loss, time = [*arm.split("/"), *("", "uniform", "hidden", "")[arm.count("/") + 1 :]]
    prune = {
        "score": score,
        "scope": scope,
        "steps": options.steps,
        "batch": options.batch,
        "lr": options.lr,
        "final": options.final,
        "dropout": 0.0,
        "gradients": options.gradients,
        "calibration": options.calibration,
    }
    if time not in ("", *TIMES):
        raise InputError(f"arm {arm}: its time is {time!r}, wanted {' or '.join(TIMES)}")
    if time or options.steps == 0:
        prune["one_shot"] = options.steps == 0 or TIMES[time]
    return recipe.validate(
        recipe.Recipe,
        {
            "name": "scores",
            "model": options.model,
            "data_root": options.data_root,
            "corpus": {"source": options.text, "max_length": options.length, "nsp": False},
            "prune": prune,
            "distill": LOSSES[loss],
            "seed": options.seed,
            "precision": fast_precision(),
        },
    )


def hidden_errors(settings: recipe.Recipe, folder: Path) -> dict[str, float]:
    """Errors of the hidden states of the model in `folder` against the dense one, on held-out text."""
    assert settings.prune is not None and settings.corpus is not None
    text = Inputs(settings).text().read()
    found = {}
    for name, loss in {"error": LOSSES["hidden"], "relative": LOSSES["relative"]}.items():
        distill = recipe.Distill(**loss)
        dense = student_objective(settings.model, settings.prune, distill, nsp=False)
        objective = PretrainingObjective(
            load_for_pretraining(str(folder), nsp=False), dense.teacher, nsp=False, **distill.model_dump()
        ).to(processes().device)
        stage = PruneSettings(settings.prune, distill, settings.corpus, settings.seed, settings.precision)
        found[name] = validate(objective, text, stage)["hidden"]
    return found


def row_of(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune, and fine-tune where tasks are given; what it lost and what it took."""
    settings = arm_recipe(arm, options)
    folder = options.out / arm.replace("/", "-")
    single.prune(settings, folder)
    record = read_json(folder / RECORD)
    row = {"arm": arm, **hidden_errors(settings, folder), "tokens": record["tokens"], "seconds": record["seconds"]}
    for name in options.tasks:
        spec = recipe.Task(
            data=name, epochs=options.epochs, max_length=options.length, lr=3e-4, dropout=0.0, hard=1.0, kd=0.0
        ).resolved(name)
        for seed in options.seeds:
            out = folder.with_name(f"{folder.name}-{name}-{seed}")
            training = {"seed": seed, "precision": settings.precision, "data_root": options.data_root}
            row[f"{name}, seed {seed}"] = single.transfer(str(folder), out, name, spec, **training)["accuracy"]
    return row


def main() -> None:
    """Read the options, make the arms in order and print the row of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--arms", nargs="+", default=["magnitude", "fisher", "obs", "hessian"])
    parser.add_argument("--final", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--gradients", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--data-root")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in vars(options).items() if name not in ("out", "model", "text", "data_root")}
    rows: list[dict[str, Any]] = []
    for arm in options.arms:
        rows.append(row_of(arm, options))
        table = {"settings": given, "rows": rows, "hardware": hardware(), "versions": versions()}
        write_json(options.out / "table.json", table)
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
