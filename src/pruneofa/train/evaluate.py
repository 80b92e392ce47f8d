"""Metrics of a model on a task, in percent, by torch or by the engine."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pruneofa import __version__, recipe
from pruneofa.data import squad
from pruneofa.data.features import TaskData, evaluation_batches
from pruneofa.data.labels import numbered, some, unnamed
from pruneofa.data.tasks import Task, load_task, longest_input
from pruneofa.engine.engine import Engine
from pruneofa.engine.load import Precision as EnginePrecision
from pruneofa.errors import InputError
from pruneofa.formats import scales
from pruneofa.formats.manifest import Manifest, is_packed
from pruneofa.formats.pack import pack
from pruneofa.formats.tensors import weights_folder
from pruneofa.progress import clock, notice, progress
from pruneofa.recipe.fields import Precision as TorchPrecision
from pruneofa.train.device import evaluation_rows, own_device, processes, shared_progress
from pruneofa.train.metrics import Measured, classification_metrics, squad_metrics
from pruneofa.train.models import check_encoder, load_tokenizer, read_model
from pruneofa.train.objective import model_inputs
from pruneofa.train.quantize import FakeQuantizer

# Features, and the logits of each: one (classes,) row, or start and end of at least as many tokens as it has.
Batch = tuple[NDArray[np.int64], tuple[Sequence[NDArray[np.float32]] | NDArray[np.float32], ...]]
_ENGINE_ROWS = 256  # rows per step of the progress bar; the engine forms its own batches
ANNOUNCED = 2.0  # seconds: the expected time of a longer evaluation is printed before it starts
_PROBE_TOKENS = 1024


def evaluate(
    path: str | Path,
    name: str,
    spec: recipe.Task,
    *,
    data_root: str | Path | None = None,
    whole: bool = False,
    batch_size: int | None = None,
    precision: TorchPrecision | EnginePrecision | None = None,
    engine: bool = False,
    threads: int | None = None,
    isa: str | None = None,
) -> dict[str, float]:
    """Metrics of the task model in the folder (or hub id) `path`; see `evaluate_model`.

    A folder that `pruneofa quantize` made is evaluated in the engine's int8 arithmetic, in torch too, unless
    `precision` is fp32.
    Classes are matched by the model's label names, so the order of its class ids does not matter.
    If the data have no validation rows, the tenth that training would hold out is evaluated, so that the result is
    comparable with models trained on these data; `whole` evaluates all rows. The number of rows is printed on stderr.

    Args:
        precision: fp32 (default) or bf16 for torch; int8 (default) or fp32 for the engine.
        engine: compute with `pruneofa.Engine`, which packed folders always use; otherwise with torch.
        threads: number of threads of the engine; for this and `isa` see `Engine.from_pretrained`.

    Raises:
        InputError: the folder has no trained head for this kind of task or has other labels, the data are wrong,
            or settings of the engine are given for torch or the reverse.
    """
    kind: Literal["classification", "qa"] = "qa" if name == "squad" else "classification"
    data = {"data_root": data_root, "whole": whole}
    folder = weights_folder(path)  # of a hub id the snapshot in the cache, where transformers finds the weights again
    if engine or is_packed(folder):
        chosen: Any = precision or "int8"  # the engine refuses bf16
        loaded = Engine.from_pretrained(folder, precision=chosen, threads=threads, isa=isa)
        if loaded.task != (purpose := "question answering" if kind == "qa" else kind):
            raise InputError(f"{path}: its head is for {loaded.task}, --task {name} needs {purpose}; "
                             "give a model of this task, or make one with `pruneofa transfer`")  # fmt: skip
        how = f", by the engine in {loaded.precision} on {loaded.isa}"
        task = _read_task(folder, name, spec, loaded.labels, loaded.max_length, how, **data)
        return evaluate_engine(loaded, task).values
    if precision == "int8" or threads is not None or isa is not None:
        raise InputError(f"{path}: int8, --threads and --isa need the engine, but torch runs this folder; "
                         "add --engine, or omit them")  # fmt: skip
    model = load_task_model(path, kind)
    if precision != "fp32" and (quantization := scales.read(folder)):
        FakeQuantizer.of(model, quantization)
        notice(f"{path} is quantized: torch simulates the int8 arithmetic of the engine")
    task = task_of(model, path, name, spec, **data)
    return evaluate_model(model, task, batch_size=batch_size, precision=precision or "fp32").values


def task_of(model: Any, path: str | Path, name: str, spec: recipe.Task, **data: Any) -> Task:
    """The evaluation rows of a task for a transformers model, by the tokenizer in its folder; see `load_task`."""
    return _read_task(path, name, spec, class_names(model.config), longest_input(model.config), **data)


def _read_task(
    path: str | Path,
    name: str,
    spec: recipe.Task,
    classes: list[str],
    max_positions: int,
    how: str = "",
    **data: Any,
) -> Task:
    """The task for a model with these classes, with the tokenizer in its folder; prints the number of rows."""
    tokenizer = load_tokenizer(path)
    labels = None if name in recipe.KNOWN_TASKS else classes
    task = load_task(name, spec, tokenizer, train=False, labels=labels, max_positions=max_positions, **data)
    counts = " and ".join(f"{split.rows.num_rows:,} rows" for split in task.evaluations.values())
    notice(f"evaluate {name}: {counts}{how}")
    for note in task.notes():
        notice(note)
    return task


def load_task_model(path: str | Path, kind: Literal["classification", "qa"]) -> PreTrainedModel:
    """Load a fine-tuned model onto the GPU if there is one, in float32.

    Raises:
        InputError: no model can be loaded, or weights are missing or of another shape and would be random.
    """
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    auto = AutoModelForQuestionAnswering if kind == "qa" else AutoModelForSequenceClassification
    model, info = read_model(auto, path)
    check_encoder(model, info, path)
    missing = sorted(info["missing_keys"])
    if missing:
        purpose = "question answering" if kind == "qa" else kind
        raise InputError(
            f"{path}: not fine-tuned for {purpose}: {len(missing)} weights "
            f"such as {missing[-1]} are missing; make a task model with `pruneofa transfer`"
        )
    return model.to(own_device()).eval()  # pyrefly: ignore[bad-argument-type]


def evaluate_model(
    model: torch.nn.Module,
    task: Task,
    *,
    batch_size: int | None = None,
    precision: TorchPrecision = "fp32",
    name: str | None = None,
) -> Measured:
    """Metrics of `model` on the evaluation rows of `task`, in percent; a long evaluation is announced on stderr.

    Args:
        model: a transformers model with a sequence-classification or question-answering head, on any device.
        task: as `load_task` returns it.
        batch_size: rows of 128 tokens per forward pass; batches of shorter rows are larger. Default: what suits the
            model's device.
        precision: bf16 runs the forward pass under autocast.
        name: what the progress bar calls it; default: the task's name.

    Returns:
        `values` has accuracy (SST-2, QNLI), accuracy and accuracy_mm (MNLI), accuracy and f1 (QQP: f1 of the class
        duplicate; other classification tasks: macro average), or exact_match and f1 (SQuAD).
    """
    columns = label_order(model.config, task) if task.kind == "classification" else None
    name = f"evaluate {name or task.name}"
    seconds = evaluation_seconds(model, task, precision=precision)
    if seconds > ANNOUNCED and processes().is_main_process:
        count = sum(map(len, task.evaluations.values()))
        notice(f"{name}: {count:,} inputs, about {clock(seconds)} (minutes:seconds)")
    rows = batch_size or evaluation_rows(next(model.parameters()).device)
    with evaluating(model):
        return _metrics(task, columns, lambda data: _forward(model, task, data, rows, precision, name))


def evaluation_seconds(model: torch.nn.Module, task: Task, *, precision: TorchPrecision = "fp32") -> float:
    """Estimated seconds of `evaluate_model` on this machine, from timing a few inputs of median length.

    If timing one input shows that the evaluation takes less than ANNOUNCED seconds, no more are timed.
    """
    total = sum(int(data.lengths.sum()) for data in task.evaluations.values())
    data = next(iter(task.evaluations.values()))
    rows = np.argsort(data.lengths, kind="stable")
    length = int(data.lengths[rows[len(rows) // 2]])
    seconds = 0.0
    with evaluating(model):
        for count in (1, 1, max(1, _PROBE_TOKENS // length)):  # the first call includes one-time allocations
            middle = max(0, len(rows) // 2 - count // 2)
            chosen = rows[middle : middle + count]
            start = time.perf_counter()
            logits_of(model, task, [data[int(row)] for row in chosen], precision)
            seconds = (time.perf_counter() - start) / int(data.lengths[chosen].sum()) * total
            if seconds <= ANNOUNCED:
                break
    return seconds


def evaluate_engine(engine: Engine, task: Task) -> Measured:
    """The metrics of `evaluate_model`, computed by an engine whose head is for this kind of task."""
    columns = _order(engine.labels, task) if task.kind == "classification" else None
    return _metrics(task, columns, lambda data: _engine_forward(engine, task, data))


def evaluate_by_engine(folder: Path, task: Task, precision: EnginePrecision) -> tuple[Measured, dict[str, Any]]:
    """Metrics of a task model on the validation rows of `task`, in percent, by the engine, and how they were computed.

    An int8 model is first packed, as for deployment, and its sizes are included: see `_sizes`.
    """
    how: dict[str, Any] = {"precision": precision, "pruneofa": __version__}
    if precision == "fp32":
        engine = Engine.from_pretrained(folder, precision=precision)
    else:
        with tempfile.TemporaryDirectory(prefix="pruneofa-") as temporary:
            how["sizes"] = _sizes(pack(folder, Path(temporary) / "packed", precision=precision, compress=True))
            engine = Engine.from_pretrained(Path(temporary) / "packed", precision=precision)
    notice(f"evaluate {folder.name} on {task.name} by the engine in {precision} on {engine.isa}")
    return evaluate_engine(engine, task), {"isa": engine.isa, "longest": engine.max_length, **how}


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of a packed model: of the encoder's linear weights including their scales, and of all tensors."""
    sizes = manifest.sizes
    assert sizes.compressed is not None and sizes.compressed_encoder is not None
    return {
        "model_fp32": 4 * sum(tensor.size for tensor in manifest.tensors.values() if tensor.kind != "tied"),
        "packed_int8": sizes.encoder,
        "packed_int8_model": sizes.file,
        "compressed_int8": sizes.compressed_encoder,
        "compressed_int8_model": sizes.compressed,
    }


def _metrics(task: Task, columns: list[int] | None, forward: Callable[[TaskData], Iterator[Batch]]) -> Measured:
    """Metrics from the logits of all evaluation rows; `columns` as `label_order` gives it, None for SQuAD."""
    found = Measured()
    for suffix, data in task.evaluations.items():
        if columns is None:
            found |= squad_metrics(*_answers(task, data, forward(data)))
            continue
        predicted = np.zeros(len(data), np.int64)
        for rows, logits in forward(data):
            predicted[rows] = np.asarray(logits[0])[:, columns].argmax(axis=1)
        assert data.targets is not None  # evaluation rows of a classification task have labels
        found |= classification_metrics(task.name, task.labels, data.targets, predicted, suffix)
    return found


def label_order(config: Any, task: Task) -> list[int]:
    """The model's class id of each label of the task: `logits[:, order]` follows `task.labels`.

    Names are compared case-insensitively. The classes of a model that were never named (LABEL_0, ...) are those of GLUE
    in its order, or the numbers by which the data name them; a notice on stderr says so.

    Raises:
        InputError: the model has other labels, or none where those of the data are names.
    """
    return _order(class_names(config), task)


def _order(names: list[str], task: Task) -> list[int]:
    by_id = task.names_by_id
    if numbered(names) and by_id is not None and sorted(by_id) == sorted(task.labels) and len(by_id) == len(names):
        meant = some([f"{name} = {label}" for name, label in zip(names, by_id, strict=True)])
        _say(f"tasks.{task.name}: the model's classes have no names, they are taken as the ids of the data's: {meant}")
        return [by_id.index(label) for label in task.labels]
    if unnamed(names) and len(names) == len(task.labels) and set(names) != {str(label) for label in task.labels}:
        return _order_of_unnamed(names, task)
    ids = {name.lower(): index for index, name in enumerate(names)}
    wanted = [label.lower() for label in task.labels]
    if len(ids) != len(names) or len(set(wanted)) != len(wanted):  # some labels differ only in case
        ids, wanted = {name: index for index, name in enumerate(names)}, task.labels
    if sorted(ids) != sorted(wanted):
        raise InputError(
            f"tasks.{task.name}: the model's labels are {some(names)}, the task's {some(task.labels)}; "
            "evaluate a model of this task, or rename id2label in its config.json"
        )
    return [ids[label] for label in wanted]


def _order_of_unnamed(names: list[str], task: Task) -> list[int]:
    order = list(range(len(names)))
    if task.name not in recipe.GLUE and task.labels != [str(index) for index in order]:
        raise InputError(
            f"tasks.{task.name}: the model's classes have no names ({some(names)}), and which of them are the data's "
            f"{some(task.labels)} is unknown; name them in id2label of the model's config.json"
        )
    meant = some([f"{name} = {label}" for name, label in zip(names, task.labels, strict=True)])
    _say(f"tasks.{task.name}: the model's classes have no names, they are taken in the task's order: {meant}")
    return order


@functools.cache
def _say(message: str) -> None:
    """A notice once: the classes of a model are ordered several times."""
    notice(message)


def class_names(config: Any) -> list[str]:
    """The names of a transformers model's classes, by class id."""
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def _answers(task: Task, data: TaskData, batches: Iterator[Batch]) -> tuple[list[str], list[list[str]]]:
    """The best answer of each row over its windows, and the gold answers."""
    windows = data.windows
    assert windows is not None  # question answering always has them
    best: dict[int, tuple[float, int, int, int]] = {}  # by row: score, -window, and the answer's characters
    for indices, (starts, ends) in batches:
        for index, start, end in zip(indices, starts, ends, strict=True):
            chars = windows.chars[windows.bounds[index] : windows.bounds[index + 1]]
            span = squad.best_span(start[: len(chars)], end[: len(chars)], chars)
            row = int(windows.row[index])
            # Batches are ordered by length. Between equal scores the first window wins, as in the engine.
            if span is not None and (row not in best or (span[0], -index) > best[row][:2]):
                best[row] = (span[0], -index, *span[1:])
    contexts = data.rows.column("context").to_pylist()
    texts = [context[slice(*best[row][2:])] if row in best else "" for row, context in enumerate(contexts)]
    return texts, squad.gold_answers(data.rows, f"tasks.{task.name}")


def _forward(
    model: torch.nn.Module, task: Task, data: TaskData, batch_size: int, precision: TorchPrecision, name: str
) -> Iterator[Batch]:
    """Yield (features, logits) of batches of similar length, longest first, so that running out of memory shows early.

    Logits are float32: one (batch, classes) array, or start and end of shape (batch, tokens).
    """
    with shared_progress(name, len(data)) as advance:
        for rows in evaluation_batches(data.lengths, batch_size):
            yield rows, logits_of(model, task, [data[int(row)] for row in rows], precision)
            advance(len(rows))


def logits_of(
    model: torch.nn.Module, task: Task, items: list[Any], precision: TorchPrecision
) -> tuple[NDArray[np.float32], ...]:
    """Logits of features in one batch, float32: (batch, classes), or of answer starts and ends (batch, tokens)."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in model_inputs(model, task.collate(items)).items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = model(**inputs)
    heads = (output.start_logits, output.end_logits) if task.kind == "qa" else (output.logits,)
    return tuple(head.float().cpu().numpy() for head in heads)


def _engine_forward(engine: Engine, task: Task, data: TaskData) -> Iterator[Batch]:
    """Like `_forward`; in question answering the logits of each window have their own number of tokens."""
    order = np.argsort(-data.lengths, kind="stable")
    with progress(f"evaluate {task.name}", len(order)) as advance:
        for begin in range(0, len(order), _ENGINE_ROWS):
            rows = order[begin : begin + _ENGINE_ROWS]
            items = [data[int(row)] for row in rows]
            types = None if data.types is None else [item["token_type_ids"] for item in items]
            logits = engine.logits([item["input_ids"] for item in items], types)
            yield rows, ([x[:, 0] for x in logits], [x[:, 1] for x in logits]) if task.kind == "qa" else (logits,)
            advance(len(rows))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """eval() and no_grad inside the block; the training mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
