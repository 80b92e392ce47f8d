"""What a run leaves to read: results.json, table, model card, report, and where its numbers come from."""

import json
import os
import platform
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pruneofa.engine.hardware import processor
from pruneofa.errors import CheckFailed
from pruneofa.formats import pattern
from pruneofa.formats.files import read_json, write_json, write_text
from pruneofa.recipe import Recipe
from pruneofa.run.by_engine import FILE as ENGINE_FILE
from pruneofa.run.by_engine import Finished, engine_columns, place

PACKAGES = ("pruneofa", "torch", "transformers", "datasets", "tokenizers", "numpy")


def collect(recipe: Recipe, folder: Path, stages: Iterable[Finished]) -> dict[str, Any]:
    """results.json from what the stages' folders hold."""
    costs = {}
    made_with = versions()
    measured: dict[str, Any] = {}
    models: list[tuple[str, Path]] = []
    for stage in stages:
        record = read_json(stage.folder / "stage.json")
        made_with = record["versions"]
        costs[stage.name] = {"tokens": record["tokens"], "seconds": record["seconds"]}
        if not stage.name.startswith("tasks/"):
            continue
        task, seed, variant = place(stage.name)
        models.append((variant, stage.folder))
        _add_runs(measured, task, seed, variant, read_json(stage.folder / "metrics.json"))
        if (by_engine := stage.folder / ENGINE_FILE).exists():
            _add_runs(measured, task, seed, f"{variant}_engine", read_json(by_engine)["metrics"])
    of_engine = engine_columns(models)
    inspection = pattern.inspect(sparse_folder(recipe, folder))
    results = {
        "recipe": publishable(recipe),
        "sparsity": inspection["encoder"],
        "versions": made_with,
        "stages": costs,
        "sizes": inspection["sizes"] | of_engine["sizes"],
        "latency": of_engine["latency"],
        "tasks": measured,
    }
    write_json(folder / "results.json", results)
    return results


def _add_runs(measured: dict[str, Any], task: str, seed: int, variant: str, metrics: dict[str, float]) -> None:
    for metric, value in metrics.items():
        entry = measured.setdefault(task, {}).setdefault(metric, {}).setdefault(variant, {"mean": 0.0, "runs": []})
        entry["runs"].append({"seed": seed, "value": value})
        entry["mean"] = statistics.fmean(run["value"] for run in entry["runs"])


def write_reports(recipe: Recipe, folder: Path, results: dict[str, Any]) -> None:
    """table.md, the model card in sparse/, and report.html."""
    from pruneofa.report.card import write_card, write_table
    from pruneofa.report.deployment import cost_tables
    from pruneofa.report.report import write_report

    inspection = pattern.inspect(sparse_folder(recipe, folder))
    log = folder / "log.jsonl"
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    write_text(folder / "table.md", write_table([results]) + cost_tables(results))
    shown = publishable(recipe)
    if recipe.prune:
        write_card(folder / "sparse", results=results, recipe=shown, inspection=inspection, versions=versions())
    write_report(folder / "report.html", results=results, recipe=shown, inspection=inspection, events=events)


def verify_run(recipe: Recipe, folder: Path) -> int:
    """Number of task models proved to keep the sparse model's pattern. Raises CheckFailed naming one that does not."""
    models = [m for m in sorted((folder / "tasks").glob("*/seed-*/*")) if m.name in ("transfer", "ptq", "quantize")]
    for model in models:
        result = pattern.verify(sparse_folder(recipe, folder), str(model))
        if not result["ok"]:
            raise CheckFailed(f"{model}: {result['revived'] or result['missing']} differ from the sparse model")
    return len(models)


def sparse_folder(recipe: Recipe, folder: Path) -> str:
    """Where the sparse pre-trained model is."""
    return str(folder / "sparse") if recipe.prune else recipe.model


def publishable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the places of one machine: paths are cut down to their last part."""
    from pruneofa.report.card import portable

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
