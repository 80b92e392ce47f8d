"""Metrics, sizes and latency of a run's task models with the engine, stored as engine.json beside each model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pruneofa import __version__
from pruneofa.engine.engine import choose_isa
from pruneofa.engine.load import Precision
from pruneofa.formats.files import read_json, write_json
from pruneofa.progress import notice
from pruneofa.run.stage import Evaluation, check_fields, check_metrics
from pruneofa.train.evaluate import evaluate_by_engine
from pruneofa.train.metrics import save_rows

FILE = "engine.json"
ROWS = "engine_metric_rows.npz"
_FIELDS = {"metrics": dict, "longest": int, "sizes": dict, "latency": dict}
# Variants of a task (names in results.json) that the engine evaluates too, with its precision.
PRECISIONS: dict[str, Precision] = {"dense": "fp32", "transfer": "fp32", "ptq": "int8", "quantize": "int8"}
LONGEST = 128  # tokens of the sequence that is timed


def measure_by_engine(evaluations: Iterable[Evaluation]) -> bool:
    """Write engine.json into the folders of task models that lack it; does nothing if no model is quantized.

    Measurements by the same version with the same kernels on the same rows are kept; when a stage is redone, they are
    deleted with its folder. Returns whether the run has a quantized model.

    Raises InputError for a model that the engine refuses, and ImportError if the engine was not built.
    """
    models = [e for e in evaluations if e.id.variant in PRECISIONS and (e.folder / "config.json").exists()]
    quantized = [e for e in models if PRECISIONS[e.id.variant] == "int8"]
    if not quantized:
        return False
    now = {"pruneofa": __version__, "isa": choose_isa(None)}
    for model in models:
        wanted = {"evaluation": model.fingerprint, **now}
        if not wanted.items() <= (read_engine(model) or {}).items():
            measured, how = evaluate_by_engine(model.folder, model.task.read(), PRECISIONS[model.id.variant])
            (model.folder / FILE).unlink(missing_ok=True)  # it would vouch for the rows of another measurement
            save_rows(model.folder / ROWS, measured)
            write_json(model.folder / FILE, {"metrics": measured.values, **how, **wanted})
    first = quantized[0].id
    timed = {e.id.variant: e.folder for e in models if (e.id.task, e.id.seed) == (first.task, first.seed)}
    if not all("latency" in read_json(folder / FILE) for folder in timed.values()):
        _add_latency(timed)
    return True


def _add_latency(folders: dict[str, Path]) -> None:
    """Time these variants of one task, and the dense model with torch, alternately; all get the same record."""
    from pruneofa.bench.latency import Runner, latency
    from pruneofa.bench.peers import PRUNEOFA, REFERENCE
    from pruneofa.bench.workers import WorkerError

    records = {variant: read_json(folder / FILE) for variant, folder in folders.items()}
    runners = [Runner(f"{name}_engine", folder, PRUNEOFA, PRECISIONS[name]) for name, folder in folders.items()]
    if "dense" in folders:
        runners.append(Runner("dense", folders["dense"], REFERENCE))
    some = next(iter(folders))
    tokens = min(LONGEST, records[some]["longest"])
    vocabulary = read_json(folders[some] / "config.json")["vocab_size"]
    try:
        found = latency(runners, tokens=tokens, vocabulary=vocabulary)
    except WorkerError as error:  # a missing latency must not make a long run fail
        notice(f"latency was not measured: {error}")
        return
    for variant, folder in folders.items():
        write_json(folder / FILE, records[variant] | {"latency": found})


def read_engine(evaluation: Evaluation) -> dict[str, Any] | None:
    """What engine.json of an evaluated model holds; None without it, or if it is of other rows, or of another model.

    Raises InputError for a record that no measurement writes.
    """
    file = evaluation.folder / FILE
    record = read_json(file) if file.exists() else {}
    if record.get("evaluation") != evaluation.fingerprint:
        return None
    check_fields(record, file, _FIELDS, ("metrics", "longest"), "it to measure again")
    check_metrics(record["metrics"], file)
    return record


def engine_columns(records: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Sizes and latency for results.json, from the first of the records (variant, engine.json) that has them.

    Sizes are preferably those of a model from quantization-aware training.
    """
    sized = [record["sizes"] for wanted in ("quantize", "ptq") for variant, record in records
             if variant == wanted and "sizes" in record]  # fmt: skip
    timed = [record["latency"] for _, record in records if "latency" in record]
    return {"sizes": next(iter(sized), {}), "latency": next(iter(timed), {})}
