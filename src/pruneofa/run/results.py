"""The reports of a run: results.json, table, model card, report.html, and versions and hardware."""

import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pruneofa.engine.hardware import processor
from pruneofa.errors import CheckFailed, InputError, short
from pruneofa.formats import pattern
from pruneofa.formats.files import write_text
from pruneofa.recipe import Recipe
from pruneofa.run.engine_metrics import ROWS as ENGINE_ROWS
from pruneofa.run.engine_metrics import engine_columns, read_engine
from pruneofa.run.events import LOG, read_events
from pruneofa.run.lineage import SPARSE, lost_pattern
from pruneofa.run.names import StageId
from pruneofa.run.stage import ROWS, Stage, Step, read_metrics, read_record
from pruneofa.train.device import processes
from pruneofa.train.metrics import Rows, load_rows, lost

RowsOf = dict[tuple[str, str, str], dict[int, Rows]]  # by task, metric and variant, then by seed
COSTS = ("tokens", "seconds", "hardware", "epochs")  # what results.json says about a stage, from its record
PACKAGES = ("pruneofa", "torch", "transformers", "datasets", "tokenizers", "numpy")


def collect(recipe: Recipe, folder: Path, steps: Iterable[Step]) -> dict[str, Any]:
    """The contents of results.json, from the records in the folders of finished steps."""
    costs = {}
    made_with = versions()
    measured: dict[str, Any] = {}
    rows: RowsOf = {}
    by_engine: list[tuple[str, dict[str, Any]]] = []
    for step in steps:
        if isinstance(step, Stage):
            record = read_record(step.folder, ("versions", "tokens", "seconds"))
            made_with = record["versions"]
            costs[str(step.id)] = {key: record[key] for key in COSTS if key in record}
            continue
        _add_runs(measured, step.id, "", read_metrics(step.folder))
        _add_rows(rows, step.id, "", load_rows(step.folder / ROWS))
        if (record := read_engine(step)) is not None:
            by_engine.append((step.id.variant, record))
            _add_runs(measured, step.id, "_engine", record["metrics"])
            _add_rows(rows, step.id, "_engine", load_rows(step.folder / ENGINE_ROWS))
    _add_lost(measured, rows)
    of_engine = engine_columns(by_engine)
    inspection = pattern.inspect(sparse_folder(recipe, folder))
    return {
        "recipe": publishable(recipe),
        "sparsity": inspection["encoder"],
        "versions": made_with,
        "stages": costs,
        "sizes": inspection["sizes"] | of_engine["sizes"],
        "latency": of_engine["latency"],
        "tasks": measured,
    }


def _add_runs(measured: dict[str, Any], stage: StageId, by: str, metrics: dict[str, float]) -> None:
    for metric, value in metrics.items():
        variants = measured.setdefault(str(stage.task), {}).setdefault(metric, {})
        entry = variants.setdefault(f"{stage.variant}{by}", {"mean": 0.0, "runs": []})
        entry["runs"].append({"seed": stage.seed, "value": value})
        entry["mean"] = statistics.fmean(run["value"] for run in entry["runs"])


def _add_rows(rows: RowsOf, stage: StageId, by: str, found: dict[str, Rows]) -> None:
    for metric, terms in found.items():
        rows.setdefault((str(stage.task), metric, f"{stage.variant}{by}"), {})[int(stage.seed or 0)] = terms


def _add_lost(measured: dict[str, Any], rows: RowsOf) -> None:
    """Add what each variant loses against the dense model by torch, where both have the terms of their rows."""
    for (task, metric, variant), of_seeds in rows.items():
        dense = rows.get((task, metric, "dense"), {})
        entry = measured[task].get(metric, {}).get(variant)
        if variant != "dense" and entry is not None and (found := lost(dense, of_seeds)) is not None:
            entry["lost"] = found


def remove_reports(folder: Path) -> None:
    """Remove results.json and what `write_reports` wrote from it, before stages that they tell of are replaced."""
    for name in ("results.json", "table.md", "report.html", "sparse/README.md"):
        (folder / name).unlink(missing_ok=True)


def write_reports(recipe: Recipe, folder: Path, results: dict[str, Any]) -> None:
    """Write table.md, the model card in sparse/, and report.html."""
    from pruneofa.report.card import write_card
    from pruneofa.report.deployment import cost_tables
    from pruneofa.report.report import write_report
    from pruneofa.report.table import write_table

    inspection = pattern.inspect(sparse_folder(recipe, folder))
    events = read_events(folder / LOG)
    write_text(folder / "table.md", write_table([results]) + cost_tables(results))
    shown = publishable(recipe)
    if recipe.prune:
        made = read_record(folder / "sparse", ("versions",))["versions"]  # which may not be the versions of now
        date = _date(events)
        write_card(folder / "sparse", results=results, recipe=shown, inspection=inspection, versions=made, date=date)
    write_report(folder / "report.html", results=results, recipe=shown, inspection=inspection, events=events)


def _date(events: Iterable[Mapping[str, Any]]) -> str | None:
    """The ISO date (UTC) on which the sparse model was last made; None if the log does not tell.

    Raises InputError for a time that is none.
    """
    made = [event.get("time") for event in events if (event.get("event"), event.get("stage")) == ("done", "prune")]
    try:
        return datetime.fromtimestamp(made[-1], UTC).date().isoformat() if made else None  # pyrefly: ignore[bad-argument-type]
    except (TypeError, ValueError, OverflowError, OSError):
        raise InputError(
            f"{LOG}: the stage prune is done at time {short(made[-1])}, wanted seconds since 1970; correct that line"
        ) from None


def verify_run(recipe: Recipe, folder: Path, steps: Iterable[Step]) -> int:
    """Number of task models, all checked to keep the sparse model's pattern.

    Raises CheckFailed if one does not: its weights, or those of the sparse model, were replaced after it was made.
    """
    models = [step.folder for step in steps if isinstance(step, Stage) and step.id.variant in SPARSE]
    sparse = sparse_folder(recipe, folder)
    for model in models:
        if lost := lost_pattern(sparse, str(model)):
            raise CheckFailed(f"{lost}: delete {model} and run again with --redo; no results were written")
    return len(models)


def sparse_folder(recipe: Recipe, folder: Path) -> str:
    """Folder or hub id of the sparse pre-trained model."""
    return str(folder / StageId(None, None, "prune").path) if recipe.prune else recipe.model


def publishable(recipe: Recipe) -> dict[str, Any]:
    """The recipe with paths of this machine shortened to their last part."""
    from pruneofa.report.render import portable

    return portable(recipe.model_dump()) | {"data_root": None}


def versions() -> dict[str, str]:
    """Versions of the packages that can affect results."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def environment() -> dict[str, Any]:
    """Versions and hardware, for run.json."""
    return {
        "versions": versions(),
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": _gpus(),
        },
    }


def hardware() -> str:
    """What a stage is trained on, in words: the GPUs of its processes, or the CPU and the threads of each process."""
    count = processes().num_processes
    times = f"{count} × " if count > 1 else ""
    if gpus := _gpus():
        return f"{times}{gpus[0]}"
    threads = torch.get_num_threads()
    return f"{times}{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
