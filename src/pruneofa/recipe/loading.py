"""Load recipe files and overrides into a validated recipe; write a recipe as YAML."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel
from yaml import MarkedYAMLError, YAMLError

from pruneofa.errors import InputError, printable
from pruneofa.recipe.fields import Section
from pruneofa.recipe.model import Card, Control, Quantize, Recipe, Task
from pruneofa.recipe.pretraining import Corpus, Distill, Prune, Teacher
from pruneofa.recipe.yaml12 import MAX_DEPTH, parse, to_yaml

_ALTERNATIVES = ("Control", "bool", "str", "list[str]")  # as pydantic names them in the location of an error
MAX_BYTES = 1 << 20  # of a recipe
T = TypeVar("T", bound=BaseModel)


def load(paths: Iterable[str | Path], overrides: Iterable[str] = ()) -> Recipe:
    """Read one or more YAML files and apply `a.b=value` overrides. Later files override earlier ones key by key.

    Raises InputError that names the file or key, and for an unknown key the most similar known one.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _updated(merged, read_keys(path))
    for override in overrides:
        merged = _updated(merged, parse_override(override))
    return validate(Recipe, merged)


def read_keys(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe file as they stand there, which may be those of another version.

    Raises InputError for what is not a file of YAML that holds a mapping.
    """
    try:
        loaded = parse(_read(Path(path)))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file; wanted one such as recipes/demo.yaml") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; wanted a recipe file such as recipes/demo.yaml") from None
    except (UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"{path}: not valid YAML: {_short(' '.join(str(error).split()))}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: got {type(loaded).__name__}, wanted a mapping of keys such as in recipes/demo.yaml")
    return loaded


def _updated(merged: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`merge`, where a task that has only its name, `sst2:` in YAML, sets nothing, and `tasks: {}` takes all out."""
    tasks = values.get("tasks")
    if tasks == {}:
        merged = merged | {"tasks": {}}
    elif isinstance(tasks, dict):
        values = values | {"tasks": {name: {} if task is None else task for name, task in tasks.items()}}
    return merge(merged, values)


def _read(path: Path) -> str:
    """The text of a recipe, which may be a pipe. Raises InputError beyond MAX_BYTES."""
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES} bytes; wanted a recipe file such as recipes/demo.yaml")
    return raw.decode("utf-8")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with the keys of `over`; nested mappings are merged recursively."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as a nested mapping; the value is YAML, so numbers and lists keep their types.

    Raises InputError for a text of another form, and for a value that is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") > MAX_DEPTH:
        raise InputError(f"--set {_short(text)}: wanted key=value, such as prune.final=0.85")
    try:
        parsed: Any = parse(value)
    except YAMLError as error:
        reason = "" if isinstance(error, MarkedYAMLError) else f" ({error})"
        what = f"--set {_short(text)}: {_short(repr(value))}"
        raise InputError(f"{what} is not valid YAML{reason}; put quotes around it") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _short(text: str) -> str:
    return printable(text if len(text) <= 200 else f"{text[:197]}...")


def validate(model: type[T], values: dict[str, Any], section: str = "") -> T:
    """Build `model` from plain values, those of a `section` such as "tasks.sst2" or of a whole recipe.

    Raises InputError that lists every problem on one line.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        problems: dict[tuple[str, ...], str] = {}
        for problem in error.errors():
            # If several types are allowed, pydantic reports one error for each; only the first is shown.
            location = tuple(str(part) for part in problem["loc"] if part not in _ALTERNATIVES)
            if not (problem["loc"][-1:] == ("bool",) and isinstance(problem["input"], dict)):
                problems.setdefault(location, _explain(model, list(location), problem, section))
        raise InputError("recipe: " + "; ".join(problems.values())) from None


def _explain(model: type[BaseModel], location: list[str], problem: Any, section: str) -> str:
    where = ".".join(filter(None, (section, *location)))
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {_short(repr(where))}; {hint}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where or 'recipe'} is {_short(repr(problem['input']))}: {message[0].lower()}{message[1:]}"


def _known_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "corpus": Corpus, "teacher": Teacher, "prune": Prune, "distill": Distill, "tasks": Task, "control": Control,
        "card": Card, "quantize": Quantize,
    }  # fmt: skip
    owner: type[BaseModel] = sections.get(location[0], model) if location else model
    return list(owner.model_fields)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, from which `load` reads an equal recipe."""
    return to_yaml(recipe.model_dump())
