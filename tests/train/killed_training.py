"""A training that is killed while a checkpoint is written, in a process that `test_checkpoints.py` forks."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from pruneofa.train import checkpoints
from pruneofa.train.callbacks import PruningCallback
from tests.train.fits import SCHEDULE, fit, objective, small_text

KILLED_AT = "checkpoint-6"


def kill() -> None:
    """As `kill -9` does it: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_a_file(state: object, path: str | Path, save: Callable[..., None] = torch.save) -> None:
    """Instead of torch.save: kill when half of the optimizer's state is in its file."""
    save(state, path)
    file = Path(path)
    if file.parent.name == KILLED_AT and file.name == checkpoints.OPTIMIZER:
        os.truncate(file, file.stat().st_size // 2)
        kill()


def kill_before_the_marker(checkpoint: Path, sync: Callable[..., None] = checkpoints.sync_tree) -> None:
    """Instead of sync_tree: kill when all files are written and none is checked."""
    if checkpoint.name == KILLED_AT:
        kill()
    sync(checkpoint)


def killed_training(where: str, root: Path) -> None:
    """Train until the kill."""
    if where == "in a file":
        torch.save = kill_in_a_file
    else:
        checkpoints.sync_tree = kill_before_the_marker
    torch.manual_seed(0)
    pruning = PruningCallback(**SCHEDULE)
    fit(objective(dropout=0.1), small_text(root), root / "work", callbacks=[pruning], save_steps=3)
