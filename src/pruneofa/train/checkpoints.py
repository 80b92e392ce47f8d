"""A training run's checkpoints: how they are written, which are complete, which can be read, and which are kept.

The training thread copies the state of training into memory, and another thread writes the copy while training goes on.
The file `complete` marks a checkpoint that was read back after it was written; it holds the checksums of its files.
"""

import errno
import json
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import safe_globals

from pruneofa.errors import InputError, first_line
from pruneofa.formats.cache import damage, write_checksums
from pruneofa.formats.files import remove_folder, sync_tree
from pruneofa.progress import notice

COMPLETE = "complete"
CLOCK_FILE = "clock.json"
KEPT = 2  # complete checkpoints: the newest, and the one before it, in case the newest is damaged
MODEL, OPTIMIZER, SCHEDULER = "model.safetensors", "optimizer.pt", "scheduler.pt"  # where the Trainer looks for them


@dataclass(frozen=True)
class Snapshot:
    """A copy in memory of what is large in a checkpoint: the weights, and the states of optimizer and scheduler."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, optimizer: Any, scheduler: Any) -> "Snapshot":
        """Copy the state of training to the CPU; of tied weights only the one that transformers stores."""
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        weights = {name: _copied(value) for name, value in model.state_dict().items() if name not in tied}
        optimizer_state = tree_map_only(torch.Tensor, _copied, optimizer.state_dict())
        return cls(weights, optimizer_state, dict(scheduler.state_dict()))

    def write(self, checkpoint: Path) -> None:
        """Write the files into the folder of the checkpoint, which holds all other files already; mark it complete."""
        safetensors.torch.save_file(self.weights, checkpoint / MODEL, {"format": "pt"})
        torch.save(self.optimizer, checkpoint / OPTIMIZER)
        torch.save(self.scheduler, checkpoint / SCHEDULER)
        mark_complete(checkpoint)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


class BackgroundWriter:
    """Runs one function after another on a thread; an error in one of them is raised by the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Run `write` on the thread, after the one before it has ended."""
        self.wait()
        self._running = self._thread.submit(write)

    def check(self) -> None:
        """Raise the error of a function that has ended; does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, whatever comes of it: after an error in training, a second error would only hide the first."""
        self._thread.shutdown()


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file of a checkpoint. Raises InputError when it is damaged."""
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file}: damaged ({first_line(error)}); resume from an older checkpoint") from None


def checkpoint_path(output_dir: str | None, step: int, file: str = "") -> Path:
    """Path of the Trainer's checkpoint of a step, or of a file in it."""
    return Path(str(output_dir)) / f"checkpoint-{step}" / file


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, oldest first: by step, since clocks can jump."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).exists()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next(reversed(complete(folder)), None)


def mark_complete(checkpoint: Path) -> None:
    """Flush a checkpoint to the disk, read it back, and mark it as complete; then delete all but KEPT of them.

    Raises OSError if it cannot be read back; the older ones are kept then.
    """
    sync_tree(checkpoint)
    if found := _damage(checkpoint):
        raise OSError(errno.EIO, f"cannot be read back: {found}", str(checkpoint))
    write_checksums(checkpoint, COMPLETE)
    for old in complete(checkpoint.parent)[:-KEPT]:
        if old != checkpoint:
            remove_folder(old)


def remove_incomplete(folder: Path) -> None:
    """Delete checkpoints that were not written to their end."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            remove_folder(path)


def remove_damaged(folder: Path) -> None:
    """Delete complete checkpoints that changed since, newest first, up to one that did not; each is named on stderr."""
    while checkpoint := last_checkpoint(folder):
        found = damage(checkpoint, COMPLETE)
        if found is None:
            return
        remove_folder(checkpoint)
        older = last_checkpoint(folder)
        next_step = f"trying {older.name}" if older else "training starts from the beginning"
        notice(f"pruneofa: warning: {checkpoint}: damaged ({found}); it is deleted, {next_step}")


def _damage(checkpoint: Path) -> str | None:
    """Why training could not resume from this checkpoint, as "file: reason"; None if every file could be read."""
    for name in (MODEL, OPTIMIZER, SCHEDULER, "trainer_state.json", CLOCK_FILE):
        if not (checkpoint / name).is_file():
            return f"{name}: missing"
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        try:
            _read_whole(file)
        except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            if "allocate" in str(error):  # out of memory: this says nothing about the file
                raise
            return f"{file.name}: {first_line(error)}"
        except OSError as error:
            if error.errno != errno.EINVAL:  # torch seeks before the start of a truncated archive
                raise
            return f"{file.name}: truncated"
    return None


def _read_whole(file: Path) -> None:
    """Read a file of a checkpoint as resuming does, one tensor at a time where the format allows it."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                stored.get_tensor(name)
    elif file.suffix in (".pt", ".pth"):
        with safe_globals():
            torch.load(file, map_location="cpu", weights_only=True)
    elif file.suffix == ".json":
        # Not read_json: the Trainer's log may contain NaN, and a file that the system cannot read is not damaged.
        json.loads(file.read_text(encoding="utf-8"))
