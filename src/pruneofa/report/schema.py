"""The schema of results.json, and reading one."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pruneofa.errors import InputError, short
from pruneofa.formats.files import is_number, read_json

RESULTS = "results.json"
METRICS = ("exact_match", "f1", "accuracy", "accuracy_mm")
METRIC_NAMES = {"exact_match": "Exact match", "f1": "F1", "accuracy": "Accuracy", "accuracy_mm": "Accuracy"}
# In the order of the table's rows. Each may also occur with the suffix `_engine`.
VARIANTS = {
    "majority": "majority class",
    "bag_of_words": "bag of words",
    "dense": "dense",
    "transfer": "Prune Once for All",
    "control": "control: pruned once, same tokens",
    "ptq": "Prune Once for All + int8 after training",
    "quantize": "Prune Once for All + int8 in training",
}


def read_results(path: Path | str) -> dict[str, Any]:
    """A validated results.json; `path` may be the run's folder. Raises InputError naming the file and key."""
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the folder of a finished run, or its {RESULTS}")
    return check_results(read_json(file), str(path))


def check_results(value: Any, source: str = "results") -> dict[str, Any]:
    """Return `value` if it has the schema of results.json. Raises InputError naming `source` and the key."""
    top = _mapping(value, source, "the whole file")
    for key in ("recipe", "sparsity", "versions", "stages", "tasks"):
        if key not in top:
            raise InputError(f"{source}: {key} is missing; wanted a results.json that pruneofa wrote")
    name = _mapping(top["recipe"], source, "recipe").get("name")
    if not isinstance(name, str):
        raise InputError(f"{source}: recipe.name is {name!r}, wanted a string")
    _number(top["sparsity"], source, "sparsity", 1)
    for stage, costs in _mapping(top["stages"], source, "stages").items():
        for key in ("tokens", "seconds"):
            _number(_mapping(costs, source, f"stages.{stage}").get(key), source, f"stages.{stage}.{key}")
        _check_training(costs, source, f"stages.{stage}")
    _check_costs(top, source)
    for task, metrics in _mapping(top["tasks"], source, "tasks").items():
        for metric, variants in _mapping(metrics, source, f"tasks.{task}").items():
            _one_of(metric, METRICS, source, f"tasks.{task}")
            for variant, value in _mapping(variants, source, f"tasks.{task}.{metric}").items():
                _one_of(variant.removesuffix("_engine"), VARIANTS, source, f"tasks.{task}.{metric}")
                _check_runs(value, source, f"tasks.{task}.{metric}.{variant}")
    return top


def _check_costs(top: dict[str, Any], source: str) -> None:
    for name, size in _mapping(top.get("sizes") or {}, source, "sizes").items():
        _number(size, source, f"sizes.{name}")
    for variant, times in _mapping(top.get("latency") or {}, source, "latency").items():
        if variant != "setting":
            _one_of(variant.removesuffix("_engine"), VARIANTS, source, "latency")
            for key in ("median_ms", "p10_ms", "p90_ms"):
                _number(_mapping(times, source, f"latency.{variant}").get(key), source, f"latency.{variant}.{key}")


def _check_training(costs: dict[str, Any], source: str, key: str) -> None:
    if not isinstance(costs.get("hardware", ""), str):
        raise InputError(f"{source}: {key}.hardware is {short(costs['hardware'])}, wanted a string")
    epochs = costs.get("epochs", [])
    if not isinstance(epochs, list):
        raise InputError(f"{source}: {key}.epochs is {short(epochs)}, wanted the metrics of every epoch")
    for number, metrics in enumerate(epochs, 1):
        for metric, value in _mapping(metrics, source, f"{key}.epochs, epoch {number}").items():
            _one_of(metric, METRICS, source, f"{key}.epochs")
            _number(value, source, f"{key}.epochs, epoch {number}, {metric}", 100)


def _check_runs(value: Any, source: str, key: str) -> None:
    mean = _number(_mapping(value, source, key).get("mean"), source, f"{key}.mean", 100)
    runs = value.get("runs")
    if not isinstance(runs, list) or not runs:
        raise InputError(f"{source}: {key}.runs is {runs!r}, wanted a list with a seed and a value per run")
    values = [
        _number(_mapping(run, source, f"{key}.runs").get("value"), source, f"{key}.runs.value", 100) for run in runs
    ]
    seeds = [run.get("seed") for run in runs]
    if any(seed in seeds[:i] for i, seed in enumerate(seeds)):
        raise InputError(f"{source}: {key}.runs has seeds {seeds}, wanted each once")
    if "lost" in value:
        points = _mapping(value["lost"], source, f"{key}.lost")
        _number(points.get("standard_error"), source, f"{key}.lost.standard_error")
        _number(points.get("mean"), source, f"{key}.lost.mean", 100, least=-100)
    if abs(mean - sum(values) / len(values)) > 0.01:
        raise InputError(
            f"{source}: {key}.mean is {mean} but its runs give {sum(values) / len(values):.4f}; "
            "the file was edited; run the recipe again"
        )


def _mapping(value: Any, source: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{source}: {key} is {short(value)}, wanted a mapping")
    return value


def _number(value: Any, source: str, key: str, largest: float = math.inf, least: float = 0) -> float:
    if not is_number(value) or not least <= value <= largest:
        limit = "a number of at least 0" if largest == math.inf else f"a number from {least:g} to {largest:g}"
        raise InputError(f"{source}: {key} is {short(value)}, wanted {limit}")
    return float(value)


def _one_of(name: str, known: Iterable[str], source: str, key: str) -> None:
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"{source}: {key} has {name!r}; {hint}")
