"""Tables of what the models of a run lose against the dense one, and of what their training took."""

import statistics
from collections.abc import Sequence
from typing import Any

from pruneofa.progress import clock
from pruneofa.report.schema import VARIANTS
from pruneofa.report.table import columns_of, variant_name, variants_of

Rows = tuple[list[str], list[list[str]]]
LOST_NOTE = (
    "Points that a model loses against the dense one (of the same seed, or the given teacher) computed by torch, ± the "
    "standard error of that difference: from the validation examples, which both answered, and, with several seeds, "
    "from the seeds."
)
_STAGES = {"teacher": "teacher preparation", "prune": "pruning", "control": VARIANTS["control"]}
_TASK_STAGES = VARIANTS | {"teacher": VARIANTS["dense"]}  # by the folders of a run


def lost_rows(results: dict[str, Any]) -> Rows:
    """Header and rows: each variant and what it loses in every column; no rows for results that do not say it."""
    columns = columns_of([results], drop_empty=True)
    rows = []
    for variant in variants_of(results):
        cells = [_lost(results, task, metrics, variant) for _, task, metrics in columns]
        if set(cells) != {"-"}:
            rows.append([variant_name(variant), *cells])
    return ["Lost against dense, points", *(title for title, _, _ in columns)], rows


def _lost(results: dict[str, Any], task: str, metrics: Sequence[str], variant: str) -> str:
    found = [results["tasks"].get(task, {}).get(metric, {}).get(variant, {}).get("lost") for metric in metrics]
    if not any(found):
        return "-"
    return " / ".join(f"{one['mean']:.2f} ± {one['standard_error']:.2f}" if one else "-" for one in found)


def training_rows(results: dict[str, Any]) -> Rows:
    """Header and rows: tokens, time and hardware of every stage that trains, and what its last epoch gave."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for stage, costs in results["stages"].items():
        if costs["tokens"]:
            groups.setdefault(_stage_name(stage), []).append(costs)
    header = ["Stage", "Tokens", "Time", "Hardware", "After each epoch", "The last epoch gave"]
    rows = []
    for name, seeds in groups.items():
        tokens, seconds = (statistics.fmean(costs[key] for costs in seeds) for key in ("tokens", "seconds"))
        hardware = " and ".join(sorted({costs["hardware"] for costs in seeds if "hardware" in costs})) or "-"
        of = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
        rows.append([f"{name}{of}", f"{tokens / 1e6:.3g} M", clock(seconds), hardware, *_epochs(seeds)])
    kept = [index for index in range(len(header)) if index < 3 or any(row[index] != "-" for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def training_note(results: dict[str, Any]) -> str:
    """What the table of `training_rows` shows."""
    note = "Mean over the seeds. Tokens are those that were trained on, without padding."
    prune = results["recipe"].get("prune") or {}
    if prune.get("score", "magnitude") != "magnitude":
        note += " Those that the scores of pruning were computed from are added."
    if any(costs.get("epochs") for costs in results["stages"].values()):
        note += (
            " After each epoch the model was evaluated on training rows that were held out (check_epochs), and "
            "the time includes that."
        )
    return note


def _stage_name(stage: str) -> str:
    """The stage without its seed: tasks/sst2/seed-0/transfer is "sst2: Prune Once for All"."""
    if "/" not in stage:
        return _STAGES.get(stage, stage)
    _, task, _, variant = stage.split("/")
    return f"{task}: {_TASK_STAGES.get(variant, variant)}"


def _epochs(seeds: list[dict[str, Any]]) -> tuple[str, str]:
    """The first metric after each epoch, and by how much the last epoch raised it, or "-" for both."""
    runs = [costs["epochs"] for costs in seeds if costs.get("epochs")]
    if not runs:
        return "-", "-"
    metric = next(iter(runs[0][0]))
    # A seed of someone else's results may have fewer epochs: those that all have are shown.
    means = [statistics.fmean(metrics[metric] for metrics in epoch) for epoch in zip(*runs, strict=False)]
    gave = f"{means[-1] - means[-2]:+.2f}" if len(means) > 1 else "-"
    return f"{metric} {', '.join(f'{mean:.2f}' for mean in means)}", gave
