"""The package keeps its shape: files import downward only, in no circle, and none grows past 400 lines."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "pruneofa"
FILES = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
# A room imports from itself and from rooms that come later here.
ROOMS = (
    "cli",
    *("run", "serve", "bench", "export"),
    *("report", "train", "data", "engine"),
    *("formats", "recipe"),
    "families",
    *("progress", "errors"),
)
# Rooms that an installation without torch runs; "" is the package's own __init__.
RUNTIME = {"cli", "serve", "bench", "engine", "formats", "recipe", "families", "errors", "progress", ""}
TRAIN_EXTRA = {"torch", "transformers", "datasets", "accelerate", "sklearn", "torchmetrics", "altair", "jinja2"}
LONGEST = 400


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, and whether it does so as soon as it is imported itself.

    `from a import b` counts as a.b, which is a module or a name in module a. What only a type checker reads is
    left out.
    """

    def visit(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import, which this test does not follow"
            yield from ((f"{node.module}.{alias.name}", eager) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager and not inside)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), True)


def file_of(name: str) -> Path | None:
    """The file of this package, relative to it, that a dotted name is defined in; None for another package's."""
    first, *parts = name.split(".")
    if first != PACKAGE.name:
        return None
    for end in range(len(parts), -1, -1):
        stem = Path(*parts[:end])
        for file in (stem.with_suffix(".py") if parts[:end] else None, stem / "__init__.py"):
            if file in FILES:
                return file
    raise AssertionError(f"{name} is no module of the package")


def room(file: Path) -> str:
    """The first folder of a file, or its name where it lies in none; "" is the package's own __init__.

    The package's __main__ is part of the command line.
    """
    return file.parts[0] if len(file.parts) > 1 else {"__init__": "", "__main__": "cli"}.get(file.stem, file.stem)


# The package's own __init__ only names what lies elsewhere, lazily; everyone may read the version there.
EDGES = {
    file: {found for name, _ in imports(path) if (found := file_of(name)) is not None and found != file}
    for file, path in FILES.items()
    if room(file)
}


def test_every_room_has_its_place() -> None:
    assert {room(file) for file in FILES} <= {*ROOMS, ""}


def test_no_circle_of_imports() -> None:
    try:
        tuple(graphlib.TopologicalSorter(EDGES).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(map(str, reversed(error.args[1]))))


def test_no_file_imports_from_a_room_above_it() -> None:
    wrong = [
        f"{file} imports {found}"
        for file, edges in EDGES.items()
        for found in sorted(edges)
        if room(found) and ROOMS.index(room(found)) < ROOMS.index(room(file))
    ]
    assert wrong == [], "\n".join(wrong)


def test_the_runtime_imports_neither_torch_nor_a_room_that_does() -> None:
    wrong = [
        f"{file} imports {name}"
        for file, path in FILES.items()
        if room(file) in RUNTIME
        for name, eager in imports(path)
        if eager
        and (name.partition(".")[0] in TRAIN_EXTRA or ((own := file_of(name)) is not None and room(own) not in RUNTIME))
    ]
    assert wrong == [], "\n".join(wrong)


def test_no_file_is_longer_than_the_limit() -> None:
    root = Path(__file__).parents[1]
    files = [file for room in ("src", "tests", "benchmarks", "results") for file in (root / room).rglob("*.py")]
    lines = {str(file.relative_to(root)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    longer = {file: count for file, count in lines.items() if count > LONGEST}
    assert longer == {}, longer
