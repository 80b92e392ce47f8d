"""Output of the verbs: messages, values, tables, models and results; and the location of shipped recipes."""

import difflib
import itertools
import json
import os
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pruneofa.errors import InputError, printable
from pruneofa.progress import notice

GAP = "  "  # between two columns of a table


def say(message: str, code: int) -> int:
    """Write a line to stderr, after the program's name, with everything not printable escaped; return `code`."""
    notice(f"pruneofa: {message}")
    return code


def say_pattern(path: str) -> None:
    """Print the sparsity of the model whose pattern will be locked; warn, once, if it has no zeros."""
    from pruneofa.formats import pattern

    sparsity = pattern.inspect(path)["encoder"]
    notice(f"locking the pattern of {path}: {100 * sparsity:.2f} % of its encoder's weights are zero")
    if sparsity == 0:
        say(f"warning: {path} has no zeros to keep: the result will be dense; give a sparse model", 0)
        warnings.filterwarnings("ignore", r"\w+ has no zeros to keep", UserWarning)


def show_model(found: dict[str, Any], layers: bool = True) -> None:
    """Print the result of `inspect`: layers, totals and sizes."""
    if layers:
        table([{"layer": name, **values} for name, values in found["layers"].items()])
    pairs({k: v for k, v in found.items() if not isinstance(v, dict)})
    table([{"stored as": k, "MB": v / 1e6} for k, v in found["sizes"].items()])
    if "engine" in found:
        where = f"on {found['engine']['isa']}, {found['engine']['activations']} activations"
        choices = {layer: choice.split(": ", 1) for layer, choice in found["engine"]["layers"].items()}
        table([{where: layer, "computed": kind, "why": why} for layer, (kind, why) in choices.items()])
        table([{"threads": found["engine"]["threads"], "because of": found["engine"]["threads_reason"]}])
        table([{"batch": case, "lanes": made} for case, made in found["engine"]["lanes"].items()])


def shipped_recipes() -> dict[str, Path]:
    """{name: file} of the recipes that ship with the package."""
    package = Path(__file__).parents[1]
    files = [file for folder in (package, package.parents[1]) for file in sorted((folder / "recipes").glob("*.yaml"))]
    return {file.stem: file for file in files}


def recipe_file(name: str) -> Path:
    """A path, or the name of a recipe that ships with the package. Raises InputError for any other name."""
    if name.endswith((".yaml", ".yml")) or os.sep in name or Path(name).exists():
        return Path(name)
    shipped = shipped_recipes()
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{name}: no such recipe; wanted a file, or one of {', '.join(shipped)}{hint}")
    return shipped[name]


def print_value(value: Any, as_json: bool, show: Callable[[], Any] | None = None) -> None:
    """Print `value` as JSON, with `show`, or as a table of its keys."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    elif show is not None:
        show()
    else:
        pairs(value)


def print_metrics(values: dict[str, Any], as_json: bool, rows: dict[str, int] | None = None) -> None:
    """Print metrics in percent, after other values that are texts; as a table with the number of `rows` if it is known.

    `rows` is by the suffix of the metrics, as in evaluation.json.
    """
    counts = rows if isinstance(rows, dict) else {}

    def line(name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        count = counts.get("_mm" if name.endswith("_mm") else "")
        known = name.startswith("accuracy") and isinstance(count, int)  # what a file says may have been edited
        return f"{value:.2f} %" + (f" of {count:,} rows" if known else "")

    print_value(values, as_json, lambda: pairs({name: line(name, value) for name, value in values.items()}))


def print_results(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the results of a run, and the paths of its result files."""

    def show() -> None:
        from pruneofa.report.table import write_table

        sys.stdout.write(printable_lines(write_table([results], drop_empty=True)))
        files = ["results.json", "table.md", "report.html", "sparse/README.md"]
        sys.stdout.write("\n" + "".join(f"{folder / file}\n" for file in files if (folder / file).exists()))
        made = [model for name in ("transfer", "quantize") for model in sorted(folder.glob(f"tasks/*/seed-*/{name}"))]
        if made:
            sys.stdout.write("\nTask models:\n" + "".join(f"{printable(str(model))}\n" for model in made))
            sys.stdout.write(f"\nNext: pruneofa pack {printable(shlex.quote(str(made[-1])))} PACKED\n")

    if results:  # empty in all processes of torchrun except the first
        print_value(results, as_json, show)


def printable_lines(text: str) -> str:
    """Lines of text, each `printable`."""
    return "".join(f"{printable(line)}\n" for line in text.split("\n")).removesuffix("\n")


def pairs(values: dict[str, Any]) -> None:
    """Print names and values as a table without a header."""
    table([{"name": name, "value": value} for name, value in values.items()], header=False)


def table(rows: list[dict[str, Any]], *, header: bool = True) -> None:
    """Print rows of the same keys as a table; where a terminal is too narrow, the longest cells go on below."""
    if not rows:
        return
    lines = [[printable(_cell(value)) for value in row.values()] for row in rows]
    if header:
        lines.insert(0, [printable(name) for name in rows[0]])
    widths = [max(1, *map(len, column)) for column in zip(*lines, strict=True)]
    # In a file or pipe no cell is folded: a hash on two lines is found by no search.
    if sys.stdout.isatty():
        room = max(shutil.get_terminal_size().columns - len(GAP) * (len(widths) - 1), 8 * len(widths))
        while sum(widths) > room:
            widths[widths.index(max(widths))] -= 1
    for line in lines:
        folded = [
            [cell] if len(cell) <= width else textwrap.wrap(cell, width)
            for cell, width in zip(line, widths, strict=True)
        ]
        for parts in itertools.zip_longest(*folded, fillvalue=""):
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            sys.stdout.write(GAP.join(padded).rstrip() + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return "-" if value is None else str(value)
