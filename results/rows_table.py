"""Print the table of the rows of MiniLM at 0.90 for docs/results.md: python results/rows_table.py results/rows.json

rows.json names the run, task and metric of each row, and the target that was set for it: the points of the dense model
that may be lost at most. The values are those of the run's results.json, and of the int8.json beside each model.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from int8 import evaluated

HEAD = ["", "dense", "90 % zeros", "lost", "target", "int8, by the engine", "seeds", "run"]


def line(row: dict[str, Any], folder: Path) -> list[str]:
    """The cells of one row; `folder` is that of its run."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"][row["task"]][row["metric"]]
    int8 = [metrics[row["metric"]] for metrics in evaluated(folder, row["task"])]
    dense, sparse = found["dense"], found["transfer"]
    assert len(int8) == len(sparse["runs"]), f"{folder}: {len(int8)} int8.json of {len(sparse['runs'])} models"
    lost = sparse["lost"]
    values = [f"{value:.2f}" for value in (dense["mean"], sparse["mean"])]
    loses = f"{lost['mean']:.2f} ± {lost['standard_error']:.2f}"
    name = folder.name
    run = f"[{name}](../results/{name}/README.md)"
    return [
        row["row"],
        *values,
        loses,
        str(row["target"]),
        f"{statistics.fmean(int8):.2f}",
        str(len(sparse["runs"])),
        run,
    ]


def table(file: Path) -> str:
    """The rows of rows.json as Markdown."""
    rows = [line(row, file.parent / row["run"]) for row in json.loads(file.read_text(encoding="utf-8"))]
    rule = ["---", *["--:"] * 6, "---"]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [HEAD, rule, *rows])


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1])))
