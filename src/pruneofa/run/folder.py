"""Checks and locks of a run's folder: its recipe, other processes, and stages that may be replaced."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pruneofa.errors import InputError
from pruneofa.formats import locks
from pruneofa.formats.files import recover, recover_all, remove_folder
from pruneofa.recipe import Recipe, read_keys
from pruneofa.run.names import RECORD
from pruneofa.run.stage import FORMAT, MARK, WORK, Model, Stage, Step
from pruneofa.train.device import processes

RUN = "run"  # the lock of a run's folder is in it, because the folder may be a volume that several machines share


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Raises InputError when `folder` contains anything other than a run of this recipe."""
    file = folder / "recipe.yaml"
    if file.exists():
        name = read_keys(file).get("name")  # no more of it: another version may have written it
        if name != recipe.name:
            raise InputError(
                f"{folder}: contains the run {name!r}, this recipe is {recipe.name!r}; choose another --out"
            )
    elif folder.exists() and any(
        p.name not in (WORK, "data") and not p.name.startswith(f".{RUN}.pruneofa-") for p in folder.iterdir()
    ):
        raise InputError(f"{folder}: not empty and not a run's folder; choose another --out")


def refuse_foreign(folder: Path, record: str) -> None:
    """Raises InputError when `folder` contains files, but not the file `record` that pruneofa writes into its own."""
    if folder.is_dir() and not (folder / record).exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: contains files, but no stage made it; move it away, or choose another output")


def refuse_others(steps: Iterable[Step], where: Path, redo: bool, out: str = "--out") -> None:
    """Raises InputError for a stage's folder that no stage made, or that is a model which the user gave.

    It would be replaced. Unless `redo` also for records of another format: it is unknown whether the settings changed.
    `where` is the folder that the message names, `out` the command-line argument for it.
    """
    stages = [step for step in steps if isinstance(step, Stage)]
    _refuse_own_inputs(stages, out)
    for stage in stages:
        refuse_foreign(stage.folder, RECORD)
    if redo:
        return
    other = {str(stage): found for stage in stages if (found := stage.other_format) is not None}
    if other:
        raise InputError(
            f"{where}: has records of format {max(other.values())}, which another version of pruneofa wrote "
            f"({', '.join(other)}); this one writes {FORMAT}; choose another {out}, or run them again with --redo"
        )


def refuse_changes(steps: Iterable[Step], where: Path, redo: bool, out: str = "--out") -> None:
    """Raises InputError listing stages, finished or begun, whose settings or inputs changed, unless `redo`.

    Of a finished stage it says what changed. Raises as `refuse_others` does too.
    """
    refuse_others(steps, where, redo, out)
    if redo:
        return
    stages = [step for step in steps if isinstance(step, Stage)]
    changed = [f"{stage.id} ({_first(stage.differences())})" for stage in stages if stage.status == "changed"]
    changed += [f"{stage.id} (unfinished)" for stage in stages if stage.begun_otherwise]
    if changed:
        raise InputError(
            f"settings or inputs of stages changed: {', '.join(changed)}; "
            f"--redo runs them again (the old ones are kept until the new ones are complete), or choose another {out}"
        )


def _refuse_own_inputs(stages: Sequence[Stage], out: str) -> None:
    made = {stage.folder.resolve(): stage for stage in stages}
    given = [model for stage in stages for model in stage.inputs.values() if isinstance(model, Model)]
    for model in given:
        if model.stage is None and (stage := made.get(Path(model.path).resolve())) is not None:
            raise InputError(f"model {model.path}: is what {stage} would replace here; choose another {out}")


def _first(differences: list[str], shown: int = 3) -> str:
    more = [f"{len(differences) - shown} more"] if len(differences) > shown else []
    return "; ".join(differences[:shown] + more)


def refuse_other_work(stages: Iterable[Stage], work: Path, redo: bool) -> None:
    """Raises InputError when stages that are not among `stages` were begun below `work`, unless `redo`."""
    known = {stage.work / MARK for stage in stages}
    marks = [mark for mark in sorted(work.rglob(MARK)) if mark not in known]
    others = [mark.parent.relative_to(work).as_posix().removeprefix(f"{WORK}/") for mark in marks]
    if others and not redo:
        raise InputError(
            f"{work}: contains {', '.join(others)} (unfinished), which this command does not continue; "
            "delete it with --redo, or choose another OUT"
        )


def refuse_links(stages: Iterable[Stage], work: Path) -> None:
    """Raises InputError when `work` or a working folder of a stage in it is a link: it could lead anywhere."""
    for stage in stages:
        for folder in (stage.work, *stage.work.parents):
            if folder.is_relative_to(work) and folder.is_symlink():
                raise InputError(f"{folder}: is a link, wanted a folder that pruneofa makes itself; remove it")


@contextlib.contextmanager
def exclusive(targets: Sequence[Path], *, name: Path, out: str = "--out") -> Iterator[None]:
    """Hold the locks of folders for all the processes that train together, and undo what killed calls left there.

    Raises InputError when another pruneofa holds one; the message calls the folder `name` and its argument `out`.
    """
    with contextlib.ExitStack() as stack:
        if processes().is_main_process:
            for target in sorted(targets):  # in one order, so that two processes cannot wait for each other
                stack.enter_context(locks.exclusive(target, name=name, out=out))
                recover(target)
        processes().wait_for_everyone()
        yield


def clear_work(work: Path) -> None:
    """Remove the working folders of stages below `work`, and the folders that are empty then; nothing else."""
    for mark in sorted(work.rglob(MARK)):
        remove_folder(mark.parent)
    recover_all(work)
    for folder in sorted((path for path in [*work.rglob("*"), work] if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
