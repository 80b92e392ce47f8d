"""What a run leaves to read: results.json, table, model card, report, and where its numbers come from."""

import json
import os
import platform
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from pruneofa import pattern
from pruneofa.errors import CheckFailed
from pruneofa.files import read_json, write_json, write_text
from pruneofa.hardware import processor
from pruneofa.recipe import Recipe
from pruneofa.train.models import with_safetensors

PACKAGES = ("pruneofa", "torch", "transformers", "datasets", "tokenizers", "numpy")


class Finished(Protocol):
    """A stage that is complete."""

    name: str
    folder: Path


def collect(recipe: Recipe, folder: Path, stages: Iterable[Finished]) -> dict[str, Any]:
    """results.json from what the stages' folders hold."""
    costs = {}
    made_with = versions()
    measured: dict[str, Any] = {}
    for stage in stages:
        record = read_json(stage.folder / "stage.json")
        made_with = record["versions"]
        costs[stage.name] = {"tokens": record["tokens"], "seconds": record["seconds"]}
        if not stage.name.startswith("tasks/"):
            continue
        _, task, seed, variant = stage.name.split("/")
        for metric, value in read_json(stage.folder / "metrics.json").items():
            runs = measured.setdefault(task, {}).setdefault(metric, {})
            entry = runs.setdefault("dense" if variant == "teacher" else variant, {"mean": 0.0, "runs": []})
            entry["runs"].append({"seed": int(seed.removeprefix("seed-")), "value": value})
            entry["mean"] = statistics.fmean(run["value"] for run in entry["runs"])
    inspection = pattern.inspect(sparse_folder(recipe, folder))
    results = {
        "recipe": publishable(recipe),
        "sparsity": inspection["encoder"],
        "versions": made_with,
        "stages": costs,
        "sizes": inspection["sizes"],
        "latency": {},
        "tasks": measured,
    }
    write_json(folder / "results.json", results)
    return results


def write_reports(recipe: Recipe, folder: Path, results: dict[str, Any]) -> None:
    """table.md, the model card in sparse/, and report.html."""
    from pruneofa.train.card import write_card, write_table
    from pruneofa.train.report import write_report

    inspection = pattern.inspect(sparse_folder(recipe, folder))
    log = folder / "log.jsonl"
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    write_text(folder / "table.md", write_table([results]))
    shown = publishable(recipe)
    if recipe.prune:
        write_card(folder / "sparse", results=results, recipe=shown, inspection=inspection, versions=versions())
    write_report(folder / "report.html", results=results, recipe=shown, inspection=inspection, events=events)


def verify_run(recipe: Recipe, folder: Path) -> int:
    """Number of task models proved to keep the sparse model's pattern. Raises CheckFailed naming one that does not."""
    checked = 0
    for transfer in sorted((folder / "tasks").glob("*/seed-*/transfer")):
        result = pattern.verify(sparse_folder(recipe, folder), str(transfer))
        if not result["ok"]:
            raise CheckFailed(f"{transfer}: {result['revived'] or result['missing']} differ from the sparse model")
        checked += 1
    return checked


def sparse_folder(recipe: Recipe, folder: Path) -> str:
    """Where the sparse pre-trained model is."""
    return str(folder / "sparse") if recipe.prune else with_safetensors(recipe.model)


def publishable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the places of one machine: paths are cut down to their last part."""
    from pruneofa.train.card import portable

    return portable(recipe.model_dump()) | {"data_root": None}


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def environment() -> dict[str, Any]:
    """Versions and hardware, for run.json."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": devices,
        },
    }
