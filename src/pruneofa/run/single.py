"""Single stages of the method, for the commands that take a model instead of a recipe."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from pruneofa.data import tasks as task_data
from pruneofa.errors import InputError
from pruneofa.formats.files import output_folder, recover_all
from pruneofa.progress import notice
from pruneofa.recipe import KNOWN_TASKS, Quantize, Recipe, Task
from pruneofa.run.checks import check, check_pattern
from pruneofa.run.events import LOG, append_event, append_events
from pruneofa.run.execute import execute_steps
from pruneofa.run.fine_tuning import refuse_other_losses, task_student
from pruneofa.run.folder import clear_work, exclusive, refuse_changes, refuse_links, refuse_other_work
from pruneofa.run.inputs import Inputs
from pruneofa.run.lineage import sparse_here
from pruneofa.run.names import RECORD, StageId
from pruneofa.run.plan import int8_stages, prune_stage, teacher_stage, transfer_stage, with_evaluation
from pruneofa.run.stage import Stage, Step, read_metrics
from pruneofa.train.device import processes
from pruneofa.train.evaluate import class_names
from pruneofa.train.models import load_config


def prune(recipe: Recipe, out: Path, *, redo: bool = False) -> dict[str, float]:
    """Teacher preparation and pruning; `out` becomes the sparse model, `out`-teacher its teacher.

    Returns the sparse model's validation losses. Raises as `run` does.
    """
    out = output_folder(out)
    inputs, work = Inputs(recipe), _work_folder(out)
    steps: list[Step] = []
    model = inputs.model(recipe.model)
    if recipe.teacher:
        teacher = teacher_stage(recipe, inputs, model, work)
        steps.append(replace(teacher, folder=out.with_name(f"{out.name}-teacher")))
        model = steps[0].model
    steps.append(replace(prune_stage(recipe, inputs, model, work), folder=out))
    return _execute(recipe, inputs, steps, out, redo)


def transfer(
    sparse: str,
    out: Path,
    name: str,
    spec: Task,
    *,
    data_root: str | None,
    seed: int,
    precision: Literal["bf16", "fp32"],
    redo: bool = False,
) -> dict[str, float]:
    """Fine-tune one sparse model on one task with its pattern locked; `out` becomes the task model.

    Returns its metrics in percent. Raises as `run` does.
    """
    recipe = Recipe(
        name="transfer",
        model=sparse,
        model_is_sparse=True,
        data_root=data_root,
        tasks={name: spec},
        seeds=[seed],
        precision=precision,
    )
    inputs, out = Inputs(recipe), output_folder(out)
    teacher = inputs.teacher(spec, seed)
    id = StageId(name, seed, "transfer")
    _note_held_out(inputs.task(name))
    stage = transfer_stage(recipe, inputs, id, inputs.model(sparse), teacher, _work_folder(out))
    return _execute(recipe, inputs, with_evaluation(replace(stage, folder=out), inputs), out, redo)


def quantize(
    model: str,
    out: Path,
    name: str,
    spec: Task,
    settings: Quantize,
    *,
    data_root: str | None,
    seed: int,
    precision: Literal["bf16", "fp32"],
    redo: bool = False,
) -> dict[str, float]:
    """Quantize one task model to int8, by training or, with `settings.ptq`, without; `out` becomes the int8 model.

    A model made by a run must still have the pattern of that run's sparse model, if it is here. Returns its metrics in
    percent.
    Raises as `run` does, and CheckFailed if the pattern is not kept.
    """
    recipe = Recipe(
        name="quantize",
        model=model,
        model_is_sparse=True,
        data_root=data_root,
        tasks={name: spec},
        quantize=settings,
        seeds=[seed],
        precision=precision,
    )
    inputs = Inputs(recipe, None if name in KNOWN_TASKS else class_names(load_config(model)))
    out = output_folder(out)
    student = task_student(model, inputs.task(name))
    if not settings.ptq:
        refuse_other_losses(student, model)
    _note_held_out(inputs.task(name))
    sparse, why = sparse_here(Path(model))
    if why is not None and processes().is_main_process:
        notice(f"{model}: its zeros are kept, but not compared with those of its run's sparse model: {why}")
    check_pattern(sparse, model)
    teacher = inputs.teacher(spec, seed)
    stages = int8_stages(recipe, inputs, name, seed, inputs.model(model), teacher, sparse, _work_folder(out))
    stage = next(stage for stage in stages if stage.id.variant == ("ptq" if settings.ptq else "quantize"))
    return _execute(recipe, inputs, with_evaluation(replace(stage, folder=out), inputs), out, redo)


def _note_held_out(task: task_data.Task) -> None:
    if task.held_out is not None and processes().is_main_process:
        held_out, rows = task.held_out
        notice(f"no --validation: {held_out:,} of {rows:,} rows held out")


def _work_folder(out: Path) -> Path:
    """Parent of the working folders of the stages that lead to `out`, removed when `out` is complete."""
    return out.with_name(f".{out.name}.pruneofa-work")


def _execute(recipe: Recipe, inputs: Inputs, steps: Sequence[Step], out: Path, redo: bool) -> dict[str, float]:
    stages = [step for step in steps if isinstance(step, Stage)]
    if all(step.status == "done" for step in steps) and processes().is_main_process:
        notice(f"{out}: is done already, nothing is computed again; these are its metrics")
    for stage in stages:
        if stage.folder.exists() and not (stage.folder / RECORD).exists():
            raise InputError(f"{stage.folder}: exists, but this command did not make it; choose another OUT")
    work = _work_folder(out)
    refuse_links(stages, work)
    fresh = not work.exists()
    if fresh:  # nothing may be written before this check
        refuse_changes(steps, out, redo, "OUT")
        check(recipe, inputs, steps)
    with exclusive([stage.folder for stage in stages], name=out, out="OUT"):
        # Checked again, because another process may have finished meanwhile. Begun work can be its own, so only now.
        refuse_changes(steps, out, redo, "OUT")
        refuse_other_work(stages, work, redo)
        if not fresh:
            check(recipe, inputs, steps)
        if processes().is_main_process:
            work.mkdir(exist_ok=True)
            recover_all(work)
        execute_steps(steps, partial(append_event, work / LOG))
        if processes().is_main_process:
            if (work / LOG).exists():  # after the events of earlier commands, such as the losses of training
                append_events(out / LOG, work / LOG)
            clear_work(work)
    return read_metrics(out)
