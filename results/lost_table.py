"""Print what each run lost against its dense models: python results/lost_table.py results/*/results.json"""

import json
import sys
from pathlib import Path
from typing import Any

METRICS = {  # column: task and its metrics
    "SST-2": ("sst2", "accuracy"),
    "QNLI": ("qnli", "accuracy"),
    "MNLI m / mm": ("mnli", "accuracy", "accuracy_mm"),
    "QQP accuracy / F1": ("qqp", "accuracy", "f1"),
    "SQuAD F1": ("squad", "f1"),
}


def cell(tasks: dict[str, Any], task: str, *metrics: str) -> str:
    """Points lost in each metric ± the standard error, with the number of seeds if there are several."""
    if task not in tasks:
        return ""
    scores = [tasks[task][metric] for metric in metrics]
    seeds = len(scores[0]["transfer"]["runs"])
    return " / ".join(map(_lost, scores)) + (f" ({seeds} seeds)" if seeds > 1 else "")


def _lost(score: dict[str, Any]) -> str:
    points = f"{score['dense']['mean'] - score['transfer']['mean']:.2f}"
    lost = score["transfer"].get("lost")  # runs of the first versions kept no standard error
    return f"{points} ± {lost['standard_error']:.2f}" if lost else points


def table(files: list[Path]) -> str:
    """A row per run, as Markdown."""
    rows = [["run", *METRICS], ["---", *["--:"] * len(METRICS)]]
    for file in files:
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        name = file.parent.name
        page = "README.md" if (file.parent / "README.md").is_file() else "table.md"
        rows.append([f"[{name}](../results/{name}/{page})", *(cell(tasks, *column) for column in METRICS.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(table([Path(name) for name in sys.argv[1:]]))
