"""The stages of a task: fine-tuning of a dense or sparse model, and int8 quantization with or without training.

Each stage is a function from its settings and models to a task model.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import transformers
from torch.utils.data import Subset
from transformers import PreTrainedModel

from pruneofa.data import tasks as task_data
from pruneofa.errors import InputError
from pruneofa.formats import scales
from pruneofa.formats.hub import local_folder
from pruneofa.formats.sentence import with_activation
from pruneofa.recipe import RESOURCES_ONLY
from pruneofa.recipe.fields import Precision
from pruneofa.run.stage import Job, Model, Outcome
from pruneofa.train.callbacks import LockCallback, QuantizeCallback
from pruneofa.train.device import own_device, prepare_models
from pruneofa.train.epochs import EpochCallback
from pruneofa.train.evaluate import class_names, label_order, load_task_model
from pruneofa.train.micro_batches import batches
from pruneofa.train.models import (
    load_config,
    load_for_task,
    load_tokenizer,
    refuse_integers,
    reorder_classes,
    set_dropout,
)
from pruneofa.train.objective import TransferObjective, model_inputs
from pruneofa.train.quantize import FakeQuantizer
from pruneofa.train.schedule import linear_lr
from pruneofa.train.teacher_logits import with_teacher_logits
from pruneofa.train.trainer import train

CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Losses:
    """Weights of the losses of a model that has a teacher, and the temperature of its distillation."""

    hard: float
    kd: float
    hidden: float
    temperature: float | None  # None if no logits are distilled


@dataclass(frozen=True)
class FineTuneSettings:
    """How a model is fine-tuned on a task.

    Attributes:
        max_length: tokens per example.
        stride: overlap of windows in tokens; None but for question answering.
        losses: weights of the losses; None without a teacher, where only the task's own loss is used.
        dropout: replaces the dropout rates of the model; None keeps them.
        freeze_embeddings: whether the word embeddings keep their values.
        locked: whether the sparsity pattern is locked.
        skip_zeros: whether locked zeros are skipped where this is faster.
    """

    epochs: int
    lr: float
    batch: int
    max_length: int
    stride: int | None
    warmup: float
    weight_decay: float
    max_grad_norm: float
    losses: Losses | None
    dropout: float | None
    freeze_embeddings: bool
    locked: bool
    seed: int
    precision: Precision
    save_minutes: float = field(metadata=RESOURCES_ONLY)
    skip_zeros: bool = field(metadata=RESOURCES_ONLY)


@dataclass(frozen=True)
class QuantizeSettings:
    """How a task model is trained with simulated int8 arithmetic.

    Attributes:
        rows: number of rows per epoch; None for all.
        freeze: share of the steps after which static scales are frozen; None for dynamic scales.
    """

    training: FineTuneSettings
    rows: int | None
    weights: str
    activations: str
    embeddings: bool
    freeze: float | None


@dataclass(frozen=True)
class CalibrationSettings:
    """How a task model is quantized without training; the last four are None for dynamic scales or if unused."""

    weights: str
    activations: str
    embeddings: bool
    max_length: int
    stride: int | None
    seed: int
    calibration: int | None
    observer: str | None
    percentile: float | None


@dataclass(frozen=True)
class GivenSettings:
    """The settings of a given model: none."""


def use_given(settings: GivenSettings, job: Job, *, model: Model) -> Outcome:
    """A task teacher that the recipe names: it is not trained, only evaluated."""
    return Outcome()


def fine_tune(
    settings: FineTuneSettings, job: Job, *, model: Model, teacher: Model | None, task: task_data.Task
) -> Outcome:
    """Fine-tune `model` on a task, distilled from `teacher` if there is one, `locked` to its sparsity pattern.

    Without a teacher only the task's own loss is used; dense task teachers are trained like this.
    """
    transformers.set_seed(settings.seed)
    objective = transfer_objective(model.path, teacher.path if teacher else None, settings.losses, task)
    prepare_student(objective.student, settings)
    task, spent = _run_teacher_once(objective, settings, job, task, settings.epochs)
    assert task.train is not None
    data = task.train.train_dataset(settings.batch, settings.seed, settings.epochs)
    callbacks: list[Any] = [LockCallback(skip_zeros=settings.skip_zeros)] if settings.locked else []
    epochs = None
    if task.epoch_rows is not None:
        epochs = EpochCallback(task, data.steps_per_epoch, job.work, job.emit, job.name)
        callbacks.append(epochs)
    clock = _train(objective, settings, job, task, data, len(data) // settings.batch, callbacks)
    clock["seconds"] += spent
    return Outcome(objective.student, load_tokenizer(model.path), epochs=epochs.found() if epochs else None, **clock)


def quantize_aware(
    settings: QuantizeSettings, job: Job, *, model: Model, teacher: Model | None, task: task_data.Task
) -> Outcome:
    """Quantization-aware training: fine-tune a task model in simulated int8 arithmetic with its pattern locked.

    The weights of the outcome are exactly code * scale.
    """
    training = settings.training
    transformers.set_seed(training.seed)
    student = task_student(model.path, task)
    objective = transfer_objective(student, teacher.path if teacher else None, training.losses, task)
    prepare_student(student, training)
    quantizer = FakeQuantizer(student, **numerics(settings))
    data, steps = qat_dataset(settings, task)
    task, spent = _run_teacher_once(objective, training, job, task, steps / data.dataset.steps_per_epoch)
    data, _ = qat_dataset(settings, task)  # with the logits
    freeze = 1.0 if settings.freeze is None else settings.freeze
    callbacks = [LockCallback(skip_zeros=False), QuantizeCallback(quantizer, freeze)]
    clock = _train(objective, training, job, task, data, steps, callbacks)
    clock["seconds"] += spent
    return _quantized(student, quantizer, model, **clock)


def calibrate(settings: CalibrationSettings, job: Job, *, model: Model, task: task_data.Task) -> Outcome:
    """Post-training quantization of a task model; static ranges come from some of its training data.

    The weights of the outcome are exactly code * scale.
    """
    start = time.monotonic()
    student = task_student(model.path, task)
    quantizer = FakeQuantizer(student, **numerics(settings))
    if settings.calibration is not None:
        assert task.train is not None
        drawn = np.random.default_rng(settings.seed).permutation(len(task.train))[: settings.calibration]
        device = next(student.parameters()).device
        drawn = drawn[np.argsort(task.train.lengths[drawn], kind="stable")]  # so that batches need little padding
        chosen = [task.train[row] for row in drawn.tolist()]
        inputs = (
            {name: value.to(device) for name, value in model_inputs(student, batch).items()}
            for batch in batches(chosen, task.collate, CALIBRATION_BATCH)
        )
        quantizer.calibrate(inputs, settings.percentile)
    return _quantized(student, quantizer, model, seconds=time.monotonic() - start)


def prepare_student(student: PreTrainedModel, settings: FineTuneSettings) -> None:
    """Set what is not trained, and the dropout rates."""
    if settings.dropout is not None:
        set_dropout(student, settings.dropout)
    if settings.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)


def _quantized(student: PreTrainedModel, quantizer: FakeQuantizer, model: Model, **clock: Any) -> Outcome:
    """Fold the quantizer into the model."""
    folded = quantizer.fold()
    quantizer.release()
    return Outcome(student, load_tokenizer(model.path), **clock, quantization=folded)


def numerics(settings: QuantizeSettings | CalibrationSettings) -> dict[str, Any]:
    """The arguments of `FakeQuantizer`."""
    return {name: getattr(settings, name) for name in ("weights", "activations", "embeddings")}


def qat_dataset(settings: QuantizeSettings, task: task_data.Task) -> tuple[Any, int]:
    """The data set of quantization-aware training, and its number of steps.

    `rows` limits an epoch to so many rows, in whole batches from the shuffled order of all of them.
    """
    assert task.train is not None
    training = settings.training
    data = task.train.train_dataset(training.batch, training.seed, training.epochs)
    share = min(1.0, settings.rows / task.train.rows.num_rows) if settings.rows else 1.0
    steps = training.epochs * max(1, round(share * data.steps_per_epoch))
    return Subset(data, range(steps * training.batch)), steps


def task_student(model: str, task: task_data.Task) -> PreTrainedModel:
    """A fine-tuned model whose classes follow the task's order.

    Raises:
        InputError: the model is already quantized, has no trained head for this kind of task, or has other labels.
    """
    if scales.is_quantized(local_folder(model)):
        raise InputError(
            f"{model}: is already quantized ({scales.SETTINGS} is in it), wanted a float model, because quantizing "
            "twice only loses accuracy; give the folder that it was made from"
        )
    refuse_integers(model, vars(load_config(model)))
    student = load_task_model(model, task.kind)
    # A cross-encoder's activation may be in a file that is not saved with the model; config.json holds it as well.
    student.config.update(with_activation({}, local_folder(model)))
    if task.kind == "classification":
        order = label_order(student.config, task)
        reorder_classes(student, order)
        old = class_names(student.config)
        names = [old[index] for index in order]
        student.config.id2label = dict(enumerate(names))
        student.config.label2id = {name: index for index, name in enumerate(names)}
    return student


def refuse_other_losses(student: PreTrainedModel, model: str) -> None:
    """Raises InputError for a classifier that was not trained with the loss of one class per row, as we train it."""
    problem = getattr(student.config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise InputError(
            f"{model}: problem_type is {problem} in config.json, but quantization-aware training has the loss of one "
            "class per row; quantize it without training: --ptq"
        )


def transfer_objective(
    model: str | PreTrainedModel, teacher: str | PreTrainedModel | None, losses: Losses | None, task: task_data.Task
) -> TransferObjective:
    """A task model and the losses it is trained with; without a teacher only the task's own loss.

    Raises InputError when the folder `teacher` has no trained head for this task.
    """
    student = load_for_task(model, task.kind, **task.model_kwargs()) if isinstance(model, str) else model
    if teacher is None or losses is None:
        return TransferObjective(student, None, kind=task.kind, hard=1.0, kd=0.0, temperature=1.0)
    loaded = load_task_model(teacher, task.kind) if isinstance(teacher, str) else teacher
    if task.kind == "classification":
        reorder_classes(loaded, label_order(loaded.config, task))
    weights = {"hard": losses.hard, "kd": losses.kd, "hidden": losses.hidden}
    return TransferObjective(student, loaded, kind=task.kind, temperature=losses.temperature or 1.0, **weights)


def runs_teacher_once(objective: TransferObjective, passes: float) -> bool:
    """Whether the teacher's logits suffice and training passes over its features more than once."""
    return objective.teacher is not None and not objective.hidden and passes > 1


def _run_teacher_once(
    objective: TransferObjective, settings: FineTuneSettings, job: Job, task: task_data.Task, passes: float
) -> tuple[task_data.Task, float]:
    """Compute the teacher's logits before training and release it, where `runs_teacher_once`.

    Returns the task that is to be trained on, and the seconds that this took.
    """
    teacher = objective.teacher
    if teacher is None or not runs_teacher_once(objective, passes):
        return task, 0.0
    prepare_models(objective.student, teacher, settings.precision)
    teacher.to(own_device())  # pyrefly: ignore[bad-argument-type]
    task, seconds = with_teacher_logits(task, teacher, job.work, settings.precision, job.name)
    objective.distil_from_batches()
    return task, seconds


def _train(
    objective: TransferObjective,
    settings: FineTuneSettings,
    job: Job,
    task: task_data.Task,
    dataset: Any,
    steps: int,
    callbacks: list[Any],
) -> dict[str, Any]:
    return train(
        objective,
        stage=job.name,
        work=job.work,
        dataset=dataset,
        collate=task.collate,
        steps=steps,
        batch=settings.batch,
        lr=settings.lr,
        rate=partial(linear_lr, total=steps, warmup=int(steps * settings.warmup)),
        emit=job.emit,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        precision=settings.precision,
        save_minutes=settings.save_minutes,
        seed=settings.seed,
        callbacks=callbacks,
    )
