"""Figures of the structure of checkouts, as JSON: file lengths, import circles, names of model families, import time.

python benchmarks/structure.py [CHECKOUT ...]

Each checkout must be installed (`make install`): its own interpreter is timed.
"""

import argparse
import ast
import json
import re
import statistics
import subprocess
import time
from pathlib import Path

import children
from checkout import check_loaded, interpreter

LIMIT = 400  # lines of a file
FAMILY = re.compile(r"distil_?bert|roberta|(?<![a-z])bert(?![a-z])|Bert(?=[A-Z])", re.IGNORECASE)
SOURCES = {".py", ".cc", ".h"}
IMPORTS = 11  # starts of the interpreter that are timed


def main() -> None:
    """Print the figures of each checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(".")])
    print(json.dumps({str(root): figures(root) for root in parser.parse_args().checkouts}, indent=1))


def figures(root: Path) -> dict[str, object]:
    """What is counted of one checkout."""
    source = root / "src" / "pruneofa"
    python = sorted(source.rglob("*.py"))
    modules = python + sorted(source.rglob("*.pyi"))  # compiled modules have a stub only
    lengths = {part: _lengths(root / part) for part in ("src", "native", "tests", "benchmarks", "results")}
    named = {p: n for p in python if (n := _names(p))}
    outside = {p: n for p, n in named.items() if "families" not in p.relative_to(source).parts}
    return {
        "files_over_400_lines": {part: sum(n > LIMIT for n in found) for part, found in lengths.items()},
        "median_lines": {part: statistics.median(found) for part, found in lengths.items() if found},
        "lines": {part: sum(found) for part, found in lengths.items()},
        "import_circles": _circles(source, modules, lazy=False),
        "import_circles_with_lazy": _circles(source, modules, lazy=True),
        "files_naming_a_family": len(named),
        "lines_naming_a_family_outside_families": sum(outside.values()),
        "files_naming_a_family_outside_families": len(outside),
        "seconds_to_import": _import_time(root),
    }


def _lengths(folder: Path) -> list[int]:
    files = (p for p in folder.rglob("*") if p.suffix in SOURCES and "__pycache__" not in p.parts)
    return [n for p in files if (n := len(p.read_text().splitlines())) > 1]


def _names(path: Path) -> int:
    return sum(bool(FAMILY.search(line)) for line in path.read_text().splitlines())


def _circles(source: Path, files: list[Path], *, lazy: bool) -> int:
    """Groups of files that reach each other by imports; with `lazy`, imports inside functions count too."""
    modules = {_module(source, p): p for p in files}
    edges = {name: _imported(path, name, modules, lazy) for name, path in modules.items()}
    reach = {name: _reached(name, edges) for name in edges}
    grouped = {frozenset(b for b in reach[a] if a in reach[b]) for a in edges if a in reach[a]}
    return len(grouped)


def _module(source: Path, path: Path) -> str:
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, name: str, modules: dict[str, Path], lazy: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    inside = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    typing = {node for test in ast.walk(tree) if _is_for_types(test) for node in ast.walk(test)}
    found = set()
    for node in ast.walk(tree):
        if node in typing or (node in inside and not lazy):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {m for m in whole if m in modules} or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {m for m in found if m in modules and m != name}


def _is_for_types(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`, which no program carries out."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = list(edges[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += edges[name]
    return seen


def _import_time(checkout: Path) -> float:
    """Median seconds of `import pruneofa` in a new interpreter, above those of an empty one."""
    python, file = interpreter(checkout), ""
    timed: dict[str, list[float]] = {"print()": [], "import pruneofa; print(pruneofa.__file__)": []}
    for _ in range(IMPORTS):
        for code, seconds in timed.items():
            start = time.perf_counter()
            printed = subprocess.run([python, "-c", code], check=True, process_group=0, stdout=subprocess.PIPE).stdout
            seconds.append(time.perf_counter() - start)
            file = printed.decode().strip()
    check_loaded(file, checkout)
    empty, full = (statistics.median(seconds) for seconds in timed.values())
    return round(full - empty, 3)


if __name__ == "__main__":
    children.run(main)
