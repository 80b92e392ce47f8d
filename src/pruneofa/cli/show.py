"""What verbs print: values, tables, models, results; and where shipped recipes are."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def say(message: str, code: int) -> int:
    """Write a line to stderr, after the program's name; return `code`."""
    sys.stderr.write(f"pruneofa: {message}\n")
    return code


def say_pattern(path: str) -> None:
    """Say how sparse the model is whose pattern will be locked; warn, once, of one without zeros."""
    from pruneofa.formats import pattern

    sparsity = pattern.inspect(path)["encoder"]
    sys.stderr.write(f"locking the pattern of {path}: {100 * sparsity:.2f} % of its encoder's weights are zero\n")
    if sparsity == 0:
        say(f"warning: {path} has no zeros to keep: the result will be dense; name a sparse model", 0)
        warnings.filterwarnings("ignore", r"\w+ has no zeros to keep", UserWarning)


def show_model(found: dict[str, Any], layers: bool = True) -> None:
    """Print what `inspect` found: its layers, totals and sizes."""
    if layers:
        table([{"layer": name, **values} for name, values in found["layers"].items()])
    table([{"": k, "value": v} for k, v in found.items() if not isinstance(v, dict)])
    table([{"stored as": k, "MB": v / 1e6} for k, v in found["sizes"].items()])
    if "engine" in found:
        where = f"on {found['engine']['isa']}, {found['engine']['activations']} activations"
        table([{where: k, "choice": v} for k, v in found["engine"]["layers"].items()])
        table([{"threads": found["engine"]["threads"], "because of": found["engine"]["threads_reason"]}])
        table([{"batch": case, "lanes": made} for case, made in found["engine"]["lanes"].items()])


def recipe_file(name: str) -> Path:
    """A path, or the name of a recipe that ships with the package."""
    if name.endswith((".yaml", ".yml")) or os.sep in name or Path(name).exists():
        return Path(name)
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    return Path(name)


def print_value(value: Any, as_json: bool, show: Callable[[], Any] | None = None) -> None:
    """Print `value` as JSON, by `show`, or as a table of its keys."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    elif show is not None:
        show()
    else:
        table([{"": key, "value": item} for key, item in value.items()])


def print_results(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the results of a run, and the files that hold them."""

    def show() -> None:
        from pruneofa.report.table import write_table

        sys.stdout.write(write_table([results], drop_empty=True))
        files = ["results.json", "table.md", "report.html", "sparse/README.md"]
        sys.stdout.write("\n" + "".join(f"{folder / file}\n" for file in files if (folder / file).exists()))

    if results:  # empty in all processes of a torchrun but the first
        print_value(results, as_json, show)


def table(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same keys as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else []:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return "-" if value is None else str(value)
