"""A corpus and a task from text that is already on the machine: the docstrings of Python and its packages.

The corpus is for pruning. The task is to classify the subject of a passage of documentation; the label is the subject
of its module. Sources are parsed, not imported, so no code is executed.
"""

import contextlib
import gc
import hashlib
import importlib.util
import json
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneofa.data.prose import docstrings, prose
from pruneofa.errors import InputError
from pruneofa.formats import files
from pruneofa.progress import progress

# Subject -> modules and packages about it, from the standard library or the dependencies of pruneofa[demo].
TOPICS: dict[str, tuple[str, ...]] = {
    "statistics": ("scipy/stats", "statistics"),
    "optimization": ("scipy/optimize",),
    "linear algebra": ("scipy/linalg", "scipy/sparse/linalg", "numpy/linalg"),
    "signals": ("scipy/signal", "scipy/fft", "scipy/fftpack", "scipy/io"),
    "graphs": ("networkx/algorithms",),
    "physics": ("sympy/physics",),
    "groups and numbers": ("sympy/combinatorics", "sympy/ntheory"),
    "tables": ("pandas/core",),
    "email": ("email", "smtplib", "imaplib", "mailbox", "poplib"),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "httpx", "httpcore", "huggingface_hub", "requests", "aiohttp"),
    "concurrency": ("asyncio", "threading", "multiprocessing", "concurrent", "queue", "anyio"),
    "files": ("zipfile", "tarfile", "gzip", "shutil", "pathlib", "fsspec", "tempfile", "bz2", "lzma", "os"),
}
NOT_DOCUMENTATION = {"test", "tests", "_vendor", "vendor", "vendored", "externals", "_external", "site-packages"}

TOPIC_CHARACTERS = 250_000  # prose read per topic: the demo prunes on less than 50,000 tokens
VALIDATION_SHARE = 0.3
TRAIN_ROWS, VALIDATION_ROWS = 16, 30  # per topic, at most: as many as a person labels in half an hour
WORDS = range(10, 41)
SHINGLE = 8  # no run of this many words of a validation passage occurs in the training text
MIN_ROWS = 8  # a topic with fewer training passages cannot be learned


@dataclass(frozen=True)
class Module:
    """The prose of one source file: paragraphs of sentences."""

    topic: str
    path: str
    validation: bool
    paragraphs: list[list[str]]


def build_demo_data(folder: Path, *, seed: int = 0, topics: dict[str, list[Path]] | None = None) -> dict[str, Any]:
    """Write `corpus.jsonl`, `train.jsonl`, `validation.jsonl` and `counts.json` into `folder`.

    All passages of a module are in the same split; the corpus holds only training modules, one document per module.
    The same environment and seed give the same bytes.

    Args:
        folder: replaced if this function made it.
        seed: seed of the split and of the sampling.
        topics: label -> source files; default: the installed modules of `TOPICS`.

    Returns:
        The counts: modules, documents, words, and rows of either split per topic.

    Raises:
        InputError: a topic has too few passages to be learned, or `folder` holds other files.
    """
    if folder.exists() and not (folder / "counts.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: contains files that are not the demo's data; choose another --out")
    sources = topics or installed_sources()
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
        "topics": {
            topic: {
                "train": sum(t == topic and not v for t, v, _ in rows),
                "validation": sum(t == topic and v for t, v, _ in rows),
            }
            for topic in sources
        },
    }
    for topic, count in counts["topics"].items():
        if count["train"] < MIN_ROWS or not count["validation"]:
            raise InputError(
                f"demo: topic {topic!r} has {count['train']} training and {count['validation']} validation "
                f"passages, wanted at least {MIN_ROWS} and 1; install its packages with 'pruneofa[demo]'"
            )
    with files.new_folder(folder) as out:
        documents = ({"text": "\n\n".join(" ".join(p) for p in module.paragraphs)} for module in corpus)
        _write_lines(out / "corpus.jsonl", documents)
        for name, split in (("train", False), ("validation", True)):
            _write_lines(out / f"{name}.jsonl", ({"text": text, "label": t} for t, v, text in rows if v == split))
        files.write_json(out / "counts.json", counts)
    return counts


def installed_sources() -> dict[str, list[Path]]:
    """Topic -> the source files about it that are installed here."""
    return {topic: [path for name in names for path in _sources(name)] for topic, names in TOPICS.items()}


def _sources(name: str) -> list[Path]:
    """The .py files of a module or package such as scipy/stats, found without importing anything."""
    spec = importlib.util.find_spec(name.split("/")[0])
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return []
    origin = Path(spec.origin)
    if origin.name != "__init__.py":
        return [origin]
    root = origin.parent.joinpath(*name.split("/")[1:])
    return sorted(p for p in root.rglob("*.py") if not NOT_DOCUMENTATION & set(p.relative_to(root).parts))


def _read(topics: dict[str, list[Path]], seed: int) -> Iterator[Module]:
    """Modules in an order that depends only on seed and path, until the topic has TOPIC_CHARACTERS of text."""
    with progress("demo data", len(topics)) as advance:
        for topic, paths in topics.items():
            size = 0
            for draw, path, name in sorted((_draw(seed, _name(path)), path, _name(path)) for path in paths):
                if size > TOPIC_CHARACTERS:
                    break
                paragraphs = _once(p for text in docstrings(path) for p in prose(text))
                size += sum(len(s) for p in paragraphs for s in p)
                if paragraphs:
                    # the low digits of the draw: its size decided the order of reading
                    yield Module(topic, name, draw % 1000 < VALIDATION_SHARE * 1000, paragraphs)
            advance(note=topic)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch garbage collection off: on syntax trees, millions of objects, it would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _once(paragraphs: Iterable[list[str]]) -> list[list[str]]:
    """The paragraphs without sentences that occur in an earlier paragraph of the module, as in overloads."""
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
    """(topic, in validation, passage), balanced and shuffled, without overlap between the splits."""
    owners: dict[str, set[str]] = defaultdict(set)
    where: dict[str, tuple[str, bool, str]] = {}
    for module in sorted(modules, key=lambda m: m.validation):  # training first: it keeps passages that are in both
        for passage in (" ".join(p[:2]) for p in module.paragraphs):
            if len(passage.split()) in WORDS:
                key = _key(passage)
                owners[key].add(module.topic)
                where.setdefault(key, (module.topic, module.validation, passage))
    leaked = _leaked(modules, {key for key, (_, validation, _) in where.items() if validation})
    pools: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for key, (topic, validation, passage) in where.items():
        if len(owners[key]) == 1 and key not in leaked:  # a passage that occurs in two topics is ambiguous
            pools[topic, validation].append(passage)
    rows = [
        (topic, validation, passage)
        for (topic, validation), pool in pools.items()
        for passage in sorted(pool, key=lambda p: _draw(seed, p))[: VALIDATION_ROWS if validation else TRAIN_ROWS]
    ]
    return sorted(rows, key=lambda row: _draw(seed + 1, row[2]))


def _key(passage: str) -> str:
    return " ".join(re.findall(r"[a-z]+", passage.lower()))


def _leaked(modules: list[Module], validation: set[str]) -> set[str]:
    """Validation passages that share SHINGLE words in a row with a paragraph of a training module."""
    holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in validation:
        for shingle in _shingles(key):
            holders[shingle].append(key)
    seen = {_key(" ".join(p)) for m in modules if not m.validation for p in m.paragraphs}
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
