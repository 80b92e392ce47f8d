"""Estimate of a run: steps, tokens, and minutes from a few steps timed on this machine."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pruneofa.data.tasks import Task, token_types
from pruneofa.progress import progress
from pruneofa.recipe import Corpus, Prune, Recipe, Teacher
from pruneofa.run.checks import check_run
from pruneofa.run.fine_tuning import (
    CalibrationSettings,
    FineTuneSettings,
    QuantizeSettings,
    numerics,
    prepare_student,
    qat_dataset,
    runs_teacher_once,
    transfer_objective,
)
from pruneofa.run.folder import check_folder
from pruneofa.run.inputs import Inputs, teacher_path
from pruneofa.run.one_shot import score_tokens
from pruneofa.run.plan import plan
from pruneofa.run.pretraining import (
    ControlSettings,
    PruneSettings,
    TeacherSettings,
    student_objective,
    teacher_objective,
    trial_folder,
)
from pruneofa.run.stage import Evaluation, Stage
from pruneofa.train import masks
from pruneofa.train.checkpoints import last_checkpoint
from pruneofa.train.device import own_device, processes, split_batch
from pruneofa.train.evaluate import evaluation_seconds
from pruneofa.train.lock import PatternLock
from pruneofa.train.models import load_for_pretraining, load_for_task
from pruneofa.train.objective import Objective, TransferObjective, model_inputs
from pruneofa.train.quantize import FakeQuantizer
from pruneofa.train.sparse_linear import can_skip, note_zeroed, skip_locked_zeros

PROBE_STEPS = 5
PROBE_TOKENS = 4096  # largest batch that is timed; larger ones are extrapolated


def estimate(recipe: Recipe, folder: Path, *, redo: bool = False) -> list[dict[str, Any]]:
    """Estimate a run: one row per stage and per evaluation, {"stage", "status", "steps", "tokens", "minutes"}.

    `tokens` counts positions of full-length examples for text, real tokens for tasks. `status` is done
    (skipped), changed (finished or begun with other settings: refused without --redo), resume or run; the
    minutes of resume are those that are left. Nothing is written, so the corpus is not tokenized.

    Raises as `run` does before it writes, except for changed stages and for the text of the corpus.
    """
    check_folder(recipe, folder)
    inputs = Inputs(recipe)
    steps = plan(recipe, inputs, folder)
    check_run(recipe, inputs, steps, folder, redo, tokenize=False)
    rows: list[dict[str, Any]] = []
    with progress("timing a few batches of each stage", len(steps)) as advance:
        timed: dict[Any, float] = {}
        for step in steps:
            if isinstance(step, Stage):
                rows.append(_stage_row(recipe, inputs, step, timed))
            else:
                rows.append(_evaluation_row(recipe, inputs, step, timed))
            advance()
    total = sum(row["minutes"] for row in rows)
    return [*rows, {"stage": "total", "status": "", "steps": None, "tokens": None, "minutes": round(total, 1)}]


def _stage_row(recipe: Recipe, inputs: Inputs, stage: Stage, timed: dict[Any, float]) -> dict[str, Any]:
    kind, steps, tokens = _size(inputs, stage)
    status, done = stage.status, 0
    if status == "run" and stage.begun:
        done = 0 if stage.begun_otherwise else _steps_done(stage)
        status = "changed" if stage.begun_otherwise else "resume" if done else "run"
    row = {"stage": str(stage.id), "status": status, "steps": steps, "tokens": tokens, "minutes": 0.0}
    if status != "done" and tokens:
        if kind not in timed:
            timed[kind] = _seconds_per_token(recipe, inputs, stage, steps, tokens)
        left = 1 - done / steps if status == "resume" else 1
        row["minutes"] = round(timed[kind] * tokens / 60 * left, 1)
    return row


def _evaluation_row(recipe: Recipe, inputs: Inputs, step: Evaluation, timed: dict[Any, float]) -> dict[str, Any]:
    name, settings = str(step.id.task), step.stage.settings
    tokens = sum(int(data.lengths.sum()) for data in inputs.task(name).evaluations.values())
    row = {"stage": str(step), "status": step.status, "steps": None, "tokens": tokens, "minutes": 0.0}
    if step.status != "done":
        int8 = numerics(settings) if isinstance(settings, QuantizeSettings | CalibrationSettings) else None
        model = recipe.model if step.id.variant != "dense" else _dense(recipe, name)
        kind = ("evaluate", name, model, int8 is not None)
        if kind not in timed:
            timed[kind] = _seconds_to_evaluate(model, inputs, name, int8)
        row["minutes"] = round(timed[kind] / 60, 1)
    return row


def _steps_done(stage: Stage) -> int:
    """Optimizer steps that are already done, for a control over all learning rates."""
    checkpoints = [last_checkpoint(stage.work)]
    done = 0
    if isinstance(settings := stage.settings, ControlSettings):
        folders = [trial_folder(stage.work, lr) for lr in settings.rates]
        done = settings.prune.steps * sum((folder / "done.json").exists() for folder in folders)
        checkpoints = [last_checkpoint(folder) for folder in folders if not (folder / "done.json").exists()]
    return done + sum(int(checkpoint.name.rpartition("-")[2]) for checkpoint in checkpoints if checkpoint)


def _size(inputs: Inputs, stage: Stage) -> tuple[Any, int, int]:
    """(key of stages with the same timing, optimizer steps, tokens) of a stage."""
    match stage.settings:
        case TeacherSettings(teacher=teacher, corpus=corpus):
            return "teacher", teacher.steps, teacher.steps * teacher.batch * corpus.max_length
        case PruneSettings(prune=prune, corpus=corpus):
            # A token that scores are computed from is counted as one that is trained on.
            tokens = prune.steps * prune.batch * corpus.max_length + score_tokens(prune, corpus.max_length)
            return "prune", prune.steps, tokens
        case ControlSettings(prune=prune, corpus=corpus, rates=rates):
            steps = prune.steps * len(rates)
            return "control", steps, steps * prune.batch * corpus.max_length
        case FineTuneSettings() as settings:
            name = str(stage.id.task)
            data = inputs.task(name).train
            assert data is not None
            positions = data.train_dataset(settings.batch, settings.seed, settings.epochs)
            kind = (name, settings.losses is not None, settings.locked)
            return kind, len(positions) // settings.batch, int(sum(data.lengths)) * settings.epochs
        case QuantizeSettings(training=training) as settings:
            name = str(stage.id.task)
            data = inputs.task(name).train
            assert data is not None
            _, steps = qat_dataset(settings, inputs.task(name))
            return (name, "int8"), steps, int(sum(data.lengths) / len(data) * steps * training.batch)
    return None, 0, 0


def _seconds_per_token(recipe: Recipe, inputs: Inputs, stage: Stage, steps: int, tokens: int) -> float:
    objective, batch = _probe(recipe, inputs, stage, tokens / max(steps, 1))
    before = 0.0
    if isinstance(objective, TransferObjective):
        training, task = _training(stage), inputs.task(str(stage.id.task))
        assert task.train is not None
        passes = steps / task.train.train_dataset(training.batch, training.seed, 1).steps_per_epoch
        if runs_teacher_once(objective, passes):
            before = _time_teacher(objective, batch, recipe.precision) / passes
            shape = (*batch["input_ids"].shape, 2) if task.kind == "qa" else (len(batch["input_ids"]), len(task.labels))
            batch["teacher_logits"] = torch.zeros(shape)
            objective.distil_from_batches()
    return (_time(objective, batch, recipe.precision) + before) / int(batch["attention_mask"].sum())


def _training(stage: Stage) -> FineTuneSettings:
    """How a stage of a task is trained."""
    return stage.settings.training if isinstance(stage.settings, QuantizeSettings) else stage.settings


def _probe(
    recipe: Recipe, inputs: Inputs, stage: Stage, tokens_per_step: float
) -> tuple[Objective, dict[str, torch.Tensor]]:
    """The objective of a stage that trains, with the arithmetic of its training, and a batch of random tokens."""
    settings = stage.settings
    if isinstance(settings, TeacherSettings):
        objective, batch = _pretraining_probe(recipe, settings.teacher, settings.corpus)
    elif isinstance(settings, PruneSettings | ControlSettings):
        objective, batch = _pretraining_probe(recipe, settings.prune, settings.corpus)
    else:
        objective, batch = _task_probe(recipe, inputs.task(str(stage.id.task)), _training(stage), tokens_per_step)
        if isinstance(settings, QuantizeSettings):
            FakeQuantizer(objective.student, **numerics(settings))
    possible = can_skip(processes=processes().num_processes, reduced=recipe.precision != "fp32", compiled=False)
    if _skips_zeros(settings) and possible and own_device().type == "cpu":
        _lock(objective.student, recipe.prune)
    return objective, batch


def _skips_zeros(settings: Any) -> bool:
    """Whether a stage trains with its pattern locked, and skips the zeros where that is faster."""
    match settings:
        case PruneSettings(prune=prune):
            return prune.at_once and prune.skip_zeros
        case ControlSettings(prune=prune):
            return prune.skip_zeros
        case FineTuneSettings():
            return settings.locked and settings.skip_zeros
    return False


@torch.no_grad()
def _lock(student: PreTrainedModel, prune: Prune | None) -> None:
    """Lock the zeros of the student; one that is not pruned yet gets as many as it will have."""
    if prune is not None:
        for weight in masks.prunable(student, tuple(prune.skip)).values():
            weight.masked_fill_(~masks.magnitude_mask(weight, prune.final, prune.pattern), 0.0)
    lock = PatternLock.capture(student)
    skip_locked_zeros(student, lock.weights, lock.pruned)


def _dense(recipe: Recipe, task: str) -> str:
    """A model of the size of the dense one that a task is distilled from."""
    return teacher_path(recipe.tasks[task], recipe.seeds[0]) or recipe.dense_model or recipe.model


def _seconds_to_evaluate(path: str, inputs: Inputs, name: str, int8: dict[str, Any] | None) -> float:
    task = inputs.task(name)
    model = load_for_task(path, task.kind, **task.model_kwargs())
    model.to(own_device())  # pyrefly: ignore[bad-argument-type]
    if int8 is not None:
        data = next(iter(task.evaluations.values()))
        batch = task.collate([data[index] for index in range(min(8, len(data)))])
        given = {name: value.to(model.device) for name, value in model_inputs(model, batch).items()}
        FakeQuantizer(model, **int8).calibrate([given])
    return evaluation_seconds(model, task)


def _pretraining_probe(
    recipe: Recipe, settings: Teacher | Prune, corpus: Corpus
) -> tuple[Objective, dict[str, torch.Tensor]]:
    if isinstance(settings, Prune):
        objective = student_objective(recipe.model, settings, recipe.distill, nsp=corpus.nsp)
    else:
        objective = teacher_objective(load_for_pretraining(recipe.model, nsp=corpus.nsp), settings, nsp=corpus.nsp)
    micro, _ = split_batch(settings.batch, settings.micro_batch)
    batch = _random_batch(objective, min(micro, max(1, PROBE_TOKENS // corpus.max_length)), corpus.max_length)
    batch["labels"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.15, batch["input_ids"], -100)
    if corpus.nsp:
        batch["next_sentence_label"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    return objective, batch


def _task_probe(
    recipe: Recipe, task: Task, settings: FineTuneSettings, tokens_per_step: float
) -> tuple[TransferObjective, dict[str, torch.Tensor]]:
    # Timing needs models of the right size, not trained ones.
    trained, dense = recipe.model if settings.locked else _dense(recipe, task.name), None
    if settings.losses is not None:
        dense = load_for_task(_dense(recipe, task.name), task.kind, **task.model_kwargs())
    objective = transfer_objective(trained, dense, settings.losses, task)
    prepare_student(objective.student, settings)
    batch = _random_batch(objective, settings.batch, max(8, round(tokens_per_step / settings.batch)))
    answers = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    keys = ("start_positions", "end_positions") if task.kind == "qa" else ("labels",)
    return objective, batch | dict.fromkeys(keys, answers)


def _random_batch(objective: Objective, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, objective.student.config.vocab_size, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    typed = token_types(objective.student.config) > 1
    return batch | ({"token_type_ids": torch.zeros_like(ids)} if typed else {})


def _time(objective: Objective, batch: dict[str, torch.Tensor], precision: str) -> float:
    """Median seconds of a full optimizer step."""
    device = own_device()
    objective.to(device).train()
    batch = {name: value.to(device) for name, value in batch.items()}
    trained = (parameter for parameter in objective.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)  # as in training
    counts = objective.counts(batch)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(batch, counts)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        note_zeroed(objective.modules())  # the step has changed nothing, as lr is 0

    return _median_seconds(step)


@torch.no_grad()
def _time_teacher(objective: TransferObjective, batch: dict[str, torch.Tensor], precision: str) -> float:
    """Median seconds of the teacher's forward pass."""
    device, teacher = own_device(), objective.teacher
    assert teacher is not None
    objective.to(device)
    inputs = {name: value.to(device) for name, value in model_inputs(teacher, batch).items()}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            teacher(**inputs)

    return _median_seconds(step)


def _median_seconds(step: Callable[[], None]) -> float:
    """Median seconds of a call on the default device; the first one, which allocates, is not counted."""
    seconds = []
    for _ in range(PROBE_STEPS):
        start = time.perf_counter()
        step()
        if own_device().type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
