"""Run a recipe in its folder: plan, check, execute missing steps, then write results, table, card and report."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pruneofa.formats.files import recover_all, write_json, write_text
from pruneofa.progress import notice
from pruneofa.recipe import Recipe, dump
from pruneofa.report.schema import check_results
from pruneofa.run.checks import check_run
from pruneofa.run.engine_metrics import measure_by_engine
from pruneofa.run.events import LOG, append_event
from pruneofa.run.execute import execute_steps
from pruneofa.run.folder import RUN, check_folder, clear_work, exclusive, refuse_changes
from pruneofa.run.inputs import Inputs
from pruneofa.run.plan import plan
from pruneofa.run.results import collect, environment, remove_reports, verify_run, write_reports
from pruneofa.run.stage import WORK, Evaluation
from pruneofa.train.device import processes


def run(
    recipe: Recipe,
    folder: Path,
    *,
    redo: bool = False,
    extend: Callable[[dict[str, Any], Inputs], None] | None = None,
) -> dict[str, Any]:
    """Execute the missing steps of a recipe in `folder`, and write results, table, card and report.

    `extend`, if given, adds to the results before they are written.
    Returns the contents of results.json. Raises InputError when the folder belongs to another recipe,
    or when the settings of finished stages have changed and `redo` is false, and CheckFailed when a task model does
    not keep the sparse model's pattern.
    """
    check_folder(recipe, folder)
    inputs = Inputs(recipe)
    steps = plan(recipe, inputs, folder)
    refuse_changes(steps, folder, redo)
    check_run(recipe, inputs, steps, folder, redo)
    without_teacher = [name for name, task in recipe.tasks.items() if task.teacher is None]
    if recipe.model_is_sparse and recipe.dense_model is None and without_teacher and processes().is_main_process:
        notice(
            f"no teacher for {', '.join(without_teacher)}: training on the labels only; "
            "set tasks.X.teacher, or dense_model to train one"
        )
    processes().wait_for_everyone()  # all ranks must check the folder before one of them writes to it
    main = processes().is_main_process
    results = {}

    def report() -> dict[str, Any]:
        results = collect(recipe, folder, steps)
        if extend is not None:
            extend(results, inputs)
        check_results(results, str(folder))  # the records that it was made of may have been edited
        write_json(folder / "results.json", results)
        write_reports(recipe, folder, results)
        return results

    with exclusive([folder / RUN], name=folder):
        if main:
            recover_all(folder)
        processes().wait_for_everyone()
        refuse_changes(steps, folder, redo)  # again: another process may have finished meanwhile
        if main:
            write_text(folder / "recipe.yaml", dump(recipe))
            if any(step.status == "changed" for step in steps):
                remove_reports(folder)  # they would stay if this run were interrupted, and tell of other models
            if any(step.status != "done" for step in steps):
                write_json(folder / "run.json", environment())
        execute_steps(steps, partial(append_event, folder / LOG))
        if main:
            clear_work(folder / WORK)
            if checked := verify_run(recipe, folder, steps):
                notice(f"verify: ok, {checked} task models keep every zero of the sparse model")
            results = report()
        processes().wait_for_everyone()
        # No collective after this: the engine takes longer than a barrier's timeout.
        if main and measure_by_engine(step for step in steps if isinstance(step, Evaluation)):
            results = report()
    return results
