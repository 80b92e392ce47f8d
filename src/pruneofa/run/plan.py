"""The method as a list: teacher, prune, control; then for each task and seed dense, transfer, int8, all evaluated."""

from pathlib import Path
from typing import Any

from pruneofa.recipe import Control, Quantize, Recipe, Task
from pruneofa.recipe.fields import Precision
from pruneofa.run.fine_tuning import (
    CalibrationSettings,
    FineTuneSettings,
    GivenSettings,
    Losses,
    QuantizeSettings,
    calibrate,
    fine_tune,
    quantize_aware,
    use_given,
)
from pruneofa.run.inputs import Inputs
from pruneofa.run.names import StageId
from pruneofa.run.pretraining import (
    ControlSettings,
    PruneSettings,
    TeacherSettings,
    prepare_teacher,
    prune_student,
    train_control,
)
from pruneofa.run.stage import WORK, Evaluation, Model, Stage, Step


def plan(recipe: Recipe, inputs: Inputs, root: Path) -> list[Step]:
    """Every step of the recipe in order, in the folder `root`. Reads task data: invalid data raise InputError."""
    steps: list[Step] = []
    teacher = inputs.model(recipe.model)
    starts = {"transfer": teacher}
    if recipe.teacher:
        steps.append(teacher_stage(recipe, inputs, teacher, root))
        teacher = steps[-1].model
    if recipe.prune:
        steps.append(prune_stage(recipe, inputs, teacher, root))
        starts["transfer"] = steps[-1].model
    if isinstance(recipe.control, Control):
        steps.append(control_stage(recipe, inputs, teacher, root))
        starts["control"] = steps[-1].model
    for name in recipe.tasks:
        for seed in recipe.seeds:
            steps += task_steps(recipe, inputs, name, seed, starts, root)
    return steps


def teacher_stage(recipe: Recipe, inputs: Inputs, model: Model, root: Path) -> Stage:
    """Teacher preparation."""
    assert recipe.teacher is not None and recipe.corpus is not None
    settings = TeacherSettings(recipe.teacher, recipe.corpus, recipe.seed, recipe.precision)
    given = {"model": model, "text": inputs.text()}
    return _stage(root, StageId(None, None, "teacher"), prepare_teacher, settings, given)


def prune_stage(recipe: Recipe, inputs: Inputs, teacher: Model, root: Path) -> Stage:
    """Student pruning, which makes the sparse model."""
    assert recipe.prune is not None and recipe.corpus is not None
    settings = PruneSettings(recipe.prune, recipe.distill, recipe.corpus, recipe.seed, recipe.precision)
    given = {"teacher": teacher, "text": inputs.text()}
    return _stage(root, StageId(None, None, "prune"), prune_student, settings, given)


def control_stage(recipe: Recipe, inputs: Inputs, teacher: Model, root: Path) -> Stage:
    """The comparison model, pruned at once."""
    assert isinstance(recipe.control, Control) and recipe.prune is not None and recipe.corpus is not None
    rates = tuple(recipe.control.lr or ())
    settings = ControlSettings(recipe.prune, recipe.distill, rates, recipe.corpus, recipe.seed, recipe.precision)
    given = {"teacher": teacher, "text": inputs.text()}
    return _stage(root, StageId(None, None, "control"), train_control, settings, given)


def task_steps(
    recipe: Recipe, inputs: Inputs, name: str, seed: int, starts: dict[str, Model], root: Path
) -> list[Step]:
    """The stages of one task with one seed, each followed by the evaluation of its model.

    `starts` are the pre-trained models to fine-tune, by variant.
    """
    steps: list[Step] = []
    spec = recipe.tasks[name].resolved(name)
    if (teacher := inputs.teacher(spec, seed)) is not None:
        first = recipe.seeds[0]
        if seed == first or teacher != inputs.teacher(spec, first):  # one model for all seeds is evaluated once
            stage = _stage(root, StageId(name, seed, "dense"), use_given, GivenSettings(), {"model": teacher})
            steps += [stage, Evaluation(stage, teacher, inputs.validation_rows(name))]
    elif not recipe.model_is_sparse or recipe.dense_model is not None:
        dense = inputs.model(recipe.dense_model or recipe.model)
        steps += with_evaluation(dense_stage(recipe, inputs, StageId(name, seed, "dense"), dense, root), inputs)
        teacher = steps[0].model
    for variant, start in starts.items():
        control = recipe.control
        if (
            variant == "control"
            and isinstance(control, Control)
            and control.tasks is not None
            and name not in control.tasks
        ):
            continue
        transfer = transfer_stage(recipe, inputs, StageId(name, seed, variant), start, teacher, root)
        steps += with_evaluation(transfer, inputs)
        if variant == "transfer" and recipe.quantize:
            for stage in int8_stages(recipe, inputs, name, seed, transfer.model, teacher, start.path, root):
                steps += with_evaluation(stage, inputs)
    return steps


def with_evaluation(stage: Stage, inputs: Inputs) -> list[Step]:
    """The stage of a task, and the evaluation of the model that it gives."""
    assert stage.id.task is not None
    return [stage, Evaluation(stage, stage.model, inputs.validation_rows(stage.id.task))]


def dense_stage(recipe: Recipe, inputs: Inputs, id: StageId, model: Model, root: Path) -> Stage:
    """The dense model of a task, the teacher of the sparse ones."""
    spec = recipe.tasks[str(id.task)].resolved(str(id.task))
    spec = spec.model_copy(update={"epochs": spec.dense_epochs, "lr": spec.dense_lr, "dropout": None})
    settings = _fine_tuning(spec, id, recipe.precision, has_teacher=False, locked=False)
    given = {"model": model, "teacher": None, "task": inputs.training_rows(str(id.task))}
    return _stage(root, id, fine_tune, settings, given)


def transfer_stage(
    recipe: Recipe, inputs: Inputs, id: StageId, model: Model, teacher: Model | None, root: Path
) -> Stage:
    """A sparse model fine-tuned on a task with its pattern locked."""
    spec = recipe.tasks[str(id.task)].resolved(str(id.task))
    settings = _fine_tuning(spec, id, recipe.precision, has_teacher=teacher is not None)
    given = {"model": model, "teacher": teacher, "task": inputs.training_rows(str(id.task))}
    return _stage(root, id, fine_tune, settings, given)


def int8_stages(
    recipe: Recipe,
    inputs: Inputs,
    name: str,
    seed: int,
    model: Model,
    teacher: Model | None,
    sparse: str | None,
    root: Path,
) -> list[Stage]:
    """Post-training quantization, if the recipe has it, and quantization-aware training of one task model.

    `sparse` is the path of the model whose pattern it must have, if that is known.
    """
    assert recipe.quantize is not None
    spec, rows = recipe.tasks[name].resolved(name), inputs.training_rows(name)
    stages = []
    if recipe.quantize.ptq:
        id = StageId(name, seed, "ptq")
        settings: Any = _calibration(recipe.quantize, spec, id)
        stages.append(_stage(root, id, calibrate, settings, {"model": model, "task": rows}, sparse))
    id = StageId(name, seed, "quantize")
    settings = _quantization(recipe.quantize, spec, id, recipe.precision, has_teacher=teacher is not None)
    given = {"model": model, "teacher": teacher, "task": rows}
    return [*stages, _stage(root, id, quantize_aware, settings, given, sparse)]


def _stage(
    root: Path, id: StageId, make: Any, settings: Any, inputs: dict[str, Any], sparse: str | None = None
) -> Stage:
    return Stage(id, make, settings, inputs, root / id.path, root / WORK / str(id), sparse)


def losses(spec: Task) -> Losses:
    """The losses of a model that has a teacher."""
    return Losses(spec.hard, spec.kd, spec.hidden, spec.temperature if spec.kd else None)


def _fine_tuning(
    spec: Task, id: StageId, precision: Precision, *, has_teacher: bool, locked: bool = True
) -> FineTuneSettings:
    assert spec.epochs and spec.lr and spec.batch and spec.max_length and id.seed is not None  # resolved() fills them
    return FineTuneSettings(
        epochs=spec.epochs,
        lr=spec.lr,
        batch=spec.batch,
        max_length=spec.max_length,
        stride=_stride(spec, id),
        warmup=spec.warmup,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        losses=losses(spec) if has_teacher else None,
        dropout=spec.dropout,
        freeze_embeddings=spec.freeze_embeddings,
        locked=locked,
        seed=id.seed,
        precision=precision,
        save_minutes=spec.save_minutes,
        skip_zeros=spec.skip_zeros,
    )


def _quantization(
    quantize: Quantize, spec: Task, id: StageId, precision: Precision, *, has_teacher: bool
) -> QuantizeSettings:
    spec = spec.model_copy(update={"epochs": spec.qat_epochs, "lr": spec.qat_lr})
    return QuantizeSettings(
        training=_fine_tuning(spec, id, precision, has_teacher=has_teacher),
        rows=spec.qat_rows,
        weights=quantize.weights,
        activations=quantize.activations,
        embeddings=quantize.embeddings,
        freeze=quantize.freeze if quantize.activations == "static" else None,
    )


def _calibration(quantize: Quantize, spec: Task, id: StageId) -> CalibrationSettings:
    assert spec.max_length and id.seed is not None
    static = quantize.activations == "static"
    return CalibrationSettings(
        weights=quantize.weights,
        activations=quantize.activations,
        embeddings=quantize.embeddings,
        max_length=spec.max_length,
        stride=_stride(spec, id),
        seed=id.seed,
        calibration=quantize.calibration if static else None,
        observer=quantize.observer if static else None,
        percentile=quantize.percentile if static and quantize.observer == "percentile" else None,
    )


def _stride(spec: Task, id: StageId) -> int | None:
    return spec.stride if id.task == "squad" else None
