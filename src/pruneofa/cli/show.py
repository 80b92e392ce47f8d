"""Output of the verbs: messages, values, tables, models and results; and the location of shipped recipes."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pruneofa.errors import printable


def say(message: str, code: int) -> int:
    """Write a line to stderr, after the program's name, with everything not printable escaped; return `code`."""
    sys.stderr.write(f"pruneofa: {printable(message)}\n")
    return code


def say_pattern(path: str) -> None:
    """Print the sparsity of the model whose pattern will be locked; warn, once, if it has no zeros."""
    from pruneofa.formats import pattern

    sparsity = pattern.inspect(path)["encoder"]
    sys.stderr.write(
        f"locking the pattern of {printable(path)}: {100 * sparsity:.2f} % of its encoder's weights are zero\n"
    )
    if sparsity == 0:
        say(f"warning: {path} has no zeros to keep: the result will be dense; give a sparse model", 0)
        warnings.filterwarnings("ignore", r"\w+ has no zeros to keep", UserWarning)


def show_model(found: dict[str, Any], layers: bool = True) -> None:
    """Print the result of `inspect`: layers, totals and sizes."""
    if layers:
        table([{"layer": name, **values} for name, values in found["layers"].items()])
    table([{"": k, "value": v} for k, v in found.items() if not isinstance(v, dict)])
    table([{"stored as": k, "MB": v / 1e6} for k, v in found["sizes"].items()])
    if "engine" in found:
        where = f"on {found['engine']['isa']}, {found['engine']['activations']} activations"
        table([{where: k, "choice": v} for k, v in found["engine"]["layers"].items()])


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
    """Print `value` as JSON, with `show`, or as a table of its keys."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    elif show is not None:
        show()
    else:
        table([{"": key, "value": item} for key, item in value.items()])


def print_results(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the results of a run, and the paths of its result files."""

    def show() -> None:
        from pruneofa.report.table import write_table

        sys.stdout.write(printable_lines(write_table([results], drop_empty=True)))
        files = ["results.json", "table.md", "report.html", "sparse/README.md"]
        sys.stdout.write("\n" + "".join(f"{folder / file}\n" for file in files if (folder / file).exists()))

    if results:  # empty in all processes of torchrun except the first
        print_value(results, as_json, show)


def printable_lines(text: str) -> str:
    """Lines of text, each `printable`."""
    return "".join(f"{printable(line)}\n" for line in text.split("\n")).removesuffix("\n")


def table(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same keys as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else []:
        table.add_column(Text(printable(column)), overflow="fold")  # Text: a str could contain markup
    for row in rows:
        table.add_row(*(Text(printable(_cell(value))) for value in row.values()))
    # In a file or pipe no cell is folded: a hash on two lines is found by no search.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return "-" if value is None else str(value)
