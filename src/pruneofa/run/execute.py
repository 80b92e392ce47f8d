"""Execute steps: train in a working folder that survives a kill, move the model into place atomically, evaluate it."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats import scales
from pruneofa.formats.files import naming_disk, new_folder, remove_folder, write_json, write_text
from pruneofa.formats.hub import local_folder
from pruneofa.formats.source import check_finite
from pruneofa.run.checks import check_pattern
from pruneofa.run.folder import refuse_foreign
from pruneofa.run.names import RECORD
from pruneofa.run.results import hardware, versions
from pruneofa.run.stage import (
    EVALUATION,
    FORMAT,
    MARK,
    METRICS,
    ROWS,
    Emit,
    Evaluation,
    Job,
    LazyData,
    Model,
    Stage,
    Step,
    fingerprinted,
)
from pruneofa.train.device import processes
from pruneofa.train.evaluate import evaluate_model, load_task_model
from pruneofa.train.metrics import save_rows
from pruneofa.train.models import model_fingerprint
from pruneofa.train.quantize import FakeQuantizer


def execute_steps(steps: Iterable[Step], emit: Emit) -> None:
    """Execute the steps that are not done, in order."""
    # The status of all steps is read first: later, another rank may already have written some of the results.
    pending = [step for step in steps if step.status != "done"]
    processes().wait_for_everyone()
    for step in pending:
        if isinstance(step, Stage):
            make(step, emit)
        else:
            evaluate(step, emit)


def make(stage: Stage, emit: Emit) -> None:
    """Make the model of a stage; work in its working folder with the same fingerprint is resumed."""
    state = processes()
    if state.is_main_process:
        refuse_foreign(stage.work, MARK)
        if stage.begun_otherwise:
            remove_folder(stage.work)
        stage.work.mkdir(parents=True, exist_ok=True)
        write_text(stage.work / MARK, stage.mark)
    state.wait_for_everyone()
    start = stage.inputs.get("model")
    if isinstance(start, Model):
        check_pattern(stage.pattern, start.path)
    inputs = {name: value.read() if isinstance(value, LazyData) else value for name, value in stage.inputs.items()}
    with naming_disk(stage.work):
        outcome = stage.make(stage.settings, Job(str(stage.id), stage.work, emit), **inputs)
    if state.is_main_process:
        with new_folder(stage.folder) as folder:
            outcome.save(folder)
            if outcome.model is not None:
                _check_saved(stage, folder)
            check_pattern(stage.pattern, str(folder))
            if outcome.metrics is not None:
                write_json(folder / METRICS, outcome.metrics)
            record: dict[str, Any] = {
                "format": FORMAT,
                "stage": str(stage.id),
                "task": stage.id.task,
                "seed": stage.id.seed,
                "variant": stage.id.variant,
                "fingerprint": stage.fingerprint,
                "settings": fingerprinted(stage.settings),
                "inputs": stage.input_fingerprints,
                "made_from": stage.made_from,
                "seconds": round(outcome.seconds, 1),
                "tokens": outcome.tokens,
                "hardware": hardware(),
                "versions": versions(),
            }
            if outcome.model is not None:
                record["output"] = model_fingerprint(str(folder))
            if outcome.epochs is not None:
                record["epochs"] = outcome.epochs
            write_json(folder / RECORD, record)
        metrics = {"metrics": outcome.metrics} if outcome.metrics is not None else {}
        emit({"event": "done", "stage": str(stage.id), "seconds": record["seconds"], **metrics})
        remove_folder(stage.work)
    state.wait_for_everyone()


def _check_saved(stage: Stage, folder: Path) -> None:
    """Read the saved weights back. Raises CheckFailed if one is NaN or infinite: then the stage does not count."""
    try:
        check_finite(folder)
    except InputError as error:
        reason = str(error).removeprefix(f"{folder}/")
        raise CheckFailed(f"{stage.id}: training diverged: {reason}, with a lower lr or precision: fp32") from None


def evaluate(step: Evaluation, emit: Emit) -> None:
    """Write the metrics of a stage's model beside it. int8 models are evaluated with the arithmetic of the engine."""
    task, start = step.task.read(), time.monotonic()
    try:
        model = load_task_model(step.model.path, task.kind)
        if quantized := scales.read(local_folder(step.model.path)):
            FakeQuantizer.of(model, quantized)
        measured = evaluate_model(model, task, name=str(step.id))
    except KeyboardInterrupt:
        after = f"{step.id} is trained, and the same command evaluates it"
        raise KeyboardInterrupt(after) from None
    if processes().is_main_process:
        seconds = round(time.monotonic() - start, 1)
        (step.folder / EVALUATION).unlink(missing_ok=True)  # it refers to the metrics that are replaced now
        write_json(step.folder / METRICS, measured.values)
        save_rows(step.folder / ROWS, measured)
        rows = {suffix: data.rows.num_rows for suffix, data in task.evaluations.items()}
        record = {"fingerprint": step.fingerprint, "rows": rows, "seconds": seconds, "versions": versions()}
        write_json(step.folder / EVALUATION, record)
        emit({"event": "evaluated", "stage": str(step.id), "seconds": seconds, "metrics": measured.values})
    processes().wait_for_everyone()
