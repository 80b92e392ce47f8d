"""One stage of the method alone, for the verbs that take a model instead of a recipe."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pruneofa.errors import InputError
from pruneofa.formats.files import read_json
from pruneofa.recipe import Quantize, Recipe, Task
from pruneofa.run.lineage import sparse_of_run
from pruneofa.run.plan import Run, Stage, carry_out, check_pattern, only_one, refuse_changes
from pruneofa.run.stages import task_student
from pruneofa.train.device import processes
from pruneofa.train.models import model_fingerprint


def prune(recipe: Recipe, out: Path, *, redo: bool = False) -> dict[str, float]:
    """Teacher preparation and pruning alone; `out` becomes the sparse model, `out`-teacher its teacher.

    Returns the sparse model's validation losses. Raises as `run` does.
    """
    places = {"teacher": out.with_name(f"{out.name}-teacher"), "sparse": out}
    this = Run(recipe, out.with_name(f".{out.name}.work"), places)
    return _alone(this.stages(), this, redo)


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
    this = Run(recipe, out.with_name(f".{out.name}.work"))
    stage = next(stage for stage in this.stages() if stage.name.endswith("/transfer"))
    return _alone([replace(stage, folder=out)], this, redo)


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

    A model that a run made must still have the pattern of that run's sparse model. Returns its metrics in percent.
    Raises as `run` does, and CheckFailed for a pattern that does not hold.
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
    this = Run(recipe, out.with_name(f".{out.name}.work"))
    task_student(model, this.task(name))
    sparse = sparse_of_run(Path(model))
    check_pattern(sparse, model)
    teacher = (spec.teacher, model_fingerprint(spec.teacher) if spec.teacher else "")
    stages = this.int8_stages(name, spec, settings, seed, (model, model_fingerprint(model)), teacher, sparse)
    wanted = "/ptq" if settings.ptq else "/quantize"
    stage = next(stage for stage in stages if stage.name.endswith(wanted))
    return _alone([replace(stage, folder=out)], this, redo)


def _alone(stages: list[Stage], this: Run, redo: bool) -> dict[str, float]:
    for stage in stages:
        if stage.folder.exists() and not (stage.folder / "stage.json").exists():
            raise InputError(f"{stage.folder}: exists and was not made by this command; choose another OUT")
    out = stages[-1].folder
    fresh = not this.folder.exists()
    if fresh:  # nothing may be written before this
        this.check(stages, redo, out)
    with only_one(this.folder, name=out, out="OUT"):
        if fresh:  # another process may have finished meanwhile
            refuse_changes(stages, this.work, redo, out)
        else:  # what is begun there may be another process's, so only now
            this.check(stages, redo, out)
        for stage in stages:
            if stage.status != "done":
                carry_out(stage, this.folder, this.emit)
        if processes().is_main_process:
            log = this.folder / "log.jsonl"
            if log.exists():
                shutil.move(log, out / log.name)
            shutil.rmtree(this.folder, ignore_errors=True)
    return read_json(out / "metrics.json")
