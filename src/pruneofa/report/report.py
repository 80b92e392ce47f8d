"""report.html from results and log of a run: one self-contained file with charts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pruneofa.formats.files import write_text
from pruneofa.report.charts import (
    FONT,
    accuracy_chart,
    layer_chart,
    log_rows,
    loss_chart,
    parts_chart,
    schedule_chart,
)
from pruneofa.report.deployment import latency_rows, latency_setting, size_rows
from pruneofa.report.render import portable, pruned_at_once, recipe_yaml, render
from pruneofa.report.schema import check_results
from pruneofa.report.table import notes, retention, table_rows
from pruneofa.report.training import LOST_NOTE, lost_rows, training_note, training_rows


def write_report(
    path: Path,
    *,
    results: dict[str, Any],
    recipe: dict[str, Any],
    inspection: dict[str, Any],
    events: Iterable[dict[str, Any]],
) -> Path:
    """Write a self-contained page: table, accuracy, schedule, losses, sparsity per layer, recipe.

    `events` are the lines of log.jsonl; charts without data are omitted. Raises InputError for results that do not
    follow the schema.
    """
    import vl_convert
    from altair.utils._importers import vl_version_for_vl_convert

    check_results(results)
    logs = log_rows(events)
    charts = {
        "accuracy": accuracy_chart(results),
        "schedule": schedule_chart(logs),
        "losses": loss_chart(logs),
        "parts": parts_chart(logs),
        "layers": layer_chart(inspection),
    }
    header, rows = table_rows([results], drop_empty=True)
    page = render(
        "report.html.j2",
        title=recipe["name"],
        recipe=recipe,
        recipe_yaml=recipe_yaml(recipe),
        versions=portable(results["versions"]),
        inspection=inspection,
        tiles=_tiles(results, inspection),
        header=header,
        rows=rows,
        notes=notes([results]),
        costs=[
            ("Lost against dense", LOST_NOTE, lost_rows(results)),
            ("Training", training_note(results), training_rows(results)),
            ("Size", "Of a task model, its weights as stored.", size_rows(results)),
            ("Latency", latency_setting(results), latency_rows(results)),
        ],
        once=pruned_at_once(recipe),
        rewound=bool(recipe.get("prune")) and recipe["prune"]["rewind"] != "none",
        charts={name: _script(chart) for name, chart in charts.items() if chart is not None},
        vega=vl_convert.javascript_bundle(  # pyrefly: ignore[missing-argument]
            vl_version=vl_version_for_vl_convert()
        ),
        font=FONT,
    )
    write_text(path, page)
    return path


def _script(chart: Any) -> str:
    # Inside a string too, "</" would end the script element, and "<!--<script" would hide its end.
    return json.dumps(chart.to_dict(), allow_nan=False).replace("<", "\\u003c")


def _tiles(results: dict[str, Any], inspection: dict[str, Any]) -> list[tuple[str, str]]:
    """The main numbers at the top of the page: (number, label)."""
    tiles = [
        (f"{results['sparsity']:.3g}", "encoder sparsity"),
        (f"{_thousands(inspection['nonzeros'])} of {_thousands(inspection['weights'])}", "encoder weights left"),
    ]
    ratios = [
        ratio
        for task, metrics in results["tasks"].items()
        for metric in metrics
        if (ratio := retention(results, task, metric)) is not None
    ]
    if ratios:
        tiles.append((f"{sum(ratios) / len(ratios):.1f} %", "of dense kept, mean of all metrics"))
    pretraining = [costs for stage, costs in results["stages"].items() if stage in ("teacher", "prune")]
    if pretraining:
        tiles.append((_thousands(sum(costs["tokens"] or 0 for costs in pretraining)), "tokens, teacher and pruning"))
    if results["stages"]:
        minutes = sum(costs["seconds"] for costs in results["stages"].values()) / 60
        tiles.append((f"{minutes:.0f} min" if minutes < 300 else f"{minutes / 60:.1f} h", "all stages"))
    return tiles


def _thousands(count: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {letter}"
    return f"{count:g}"
