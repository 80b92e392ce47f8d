"""Checks and locks of a run's folder: its recipe, other processes, and stages that may be replaced."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from pruneofa.errors import InputError
from pruneofa.recipe import Recipe, load
from pruneofa.run.stage import FORMAT, MARK, WORK, Stage, Step
from pruneofa.train.device import processes

LOCK = ".lock"


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Raises InputError when `folder` contains anything other than a run of this recipe."""
    file = folder / "recipe.yaml"
    if file.exists():
        name = load([file]).name
        if name != recipe.name:
            raise InputError(
                f"{folder}: contains the run {name!r}, this recipe is {recipe.name!r}; choose another --out"
            )
    elif folder.exists() and any(p.name not in (WORK, LOCK, "data") for p in folder.iterdir()):
        raise InputError(f"{folder}: not empty and not a run's folder; choose another --out")


def refuse_changes(steps: Iterable[Step], where: Path, redo: bool, out: str = "--out") -> None:
    """Raises InputError listing stages, finished or begun, whose settings or inputs changed, unless `redo`.

    Of a finished stage it says what changed.

    Stages with a record of an earlier format are refused too, because it is unknown whether their settings changed.
    `where` is the folder that the message names, `out` the command-line argument for it.
    """
    stages = [step for step in steps if isinstance(step, Stage)]
    earlier = [(stage, version) for stage in stages if (version := stage.earlier) is not None]
    if earlier and not redo:
        names = ", ".join(str(stage.id) for stage, _ in earlier)
        raise InputError(
            f"{where}: made by pruneofa {earlier[0][1]}, whose stages do not record all settings ({names}); "
            f"wanted stages of format {FORMAT}; choose another {out}, or run them again with --redo"
        )
    changed = [f"{stage.id} ({_first(stage.differences())})" for stage in stages if stage.status == "changed"]
    changed += [f"{stage.id} (unfinished)" for stage in stages if stage.begun not in (None, stage.fingerprint)]
    if changed and not redo:
        raise InputError(
            f"settings or inputs of stages changed: {', '.join(changed)}; "
            f"--redo runs them again (the old ones are kept until the new ones are complete), or choose another {out}"
        )


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


@contextlib.contextmanager
def exclusive(folder: Path, *, name: Path | None = None, out: str = "--out") -> Iterator[None]:
    """Hold an exclusive lock on the folder of a run, or of one stage's work.

    Raises InputError when another process holds it; the message calls the folder `name` and its argument `out`.
    """
    if not processes().is_main_process:
        yield
        return
    with _lock_file(folder) as file:
        if file is None:
            raise InputError(
                f"{name or folder}: another pruneofa is at work here; wait for it, or choose another {out}"
            )
        yield


@contextlib.contextmanager
def _lock_file(folder: Path) -> Iterator[TextIO | None]:
    """Create the folder's lock file and lock it; None if another process holds the lock."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / LOCK, "w")  # noqa: SIM115 - closed below, once it is known to be there
        except FileNotFoundError:  # the previous owner has just removed the folder
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not _is_at(file, folder / LOCK):  # removed between opening and locking: the lock has no effect
                continue
            yield file
            return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
