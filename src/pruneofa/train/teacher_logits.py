"""A task teacher's logits for all training features, computed once instead of in every epoch.

The teacher is frozen and sees the same tokens in every epoch, so only rounding differs from running it in every step:
its batches have other features. Its hidden states are too many to keep: where they are distilled, it runs in every
step (docs/decisions/0021).
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pruneofa.data.features import TaskData, evaluation_batches
from pruneofa.data.tasks import Task
from pruneofa.formats.files import read_json, write_json
from pruneofa.train.device import evaluation_rows, processes, shared_progress
from pruneofa.train.evaluate import TorchPrecision, evaluating, logits_of

FILE = "teacher_logits.npy"
SECONDS_FILE = "teacher_logits.json"  # {"seconds": spent on it so far}


def with_teacher_logits(
    task: Task, teacher: nn.Module, work: Path, precision: TorchPrecision, name: str
) -> tuple[Task, float]:
    """`task` with the logits of `teacher` in its training features, and the seconds that this took in all attempts.

    They are kept in `work`: after an interruption, batches that were computed before are not computed again. Of several
    processes one computes and the others wait.

    Args:
        teacher: a model with the task's head, its classes in the task's order, on the device that computes.
        precision: bf16 computes under autocast, as training does.
        name: of the stage, for the progress bar.
    """
    data = task.train
    assert data is not None
    begun = time.monotonic()
    with processes().main_process_first():
        logits = _computed(task, data, teacher, work / FILE, precision, f"{name}: teacher")
    before = read_json(work / SECONDS_FILE)["seconds"] if (work / SECONDS_FILE).exists() else 0.0
    seconds = before + time.monotonic() - begun
    if processes().is_main_process:
        write_json(work / SECONDS_FILE, {"seconds": seconds})
    task = dataclasses.replace(task, train=dataclasses.replace(data, teacher_logits=logits))
    return task, seconds


def _computed(
    task: Task, data: TaskData, teacher: nn.Module, file: Path, precision: TorchPrecision, name: str
) -> NDArray[np.float32]:
    classes = 2 if task.kind == "qa" else len(task.labels)
    kept = _open(file, (len(data.ids) if task.kind == "qa" else len(data), classes))
    size = evaluation_rows(next(teacher.parameters()).device)
    with shared_progress(name, len(data)) as advance, evaluating(teacher):
        for features in evaluation_batches(data.lengths, size):
            tokens = np.concatenate([np.arange(*data.bounds[feature : feature + 2]) for feature in features])
            places = tokens if task.kind == "qa" else features
            if np.isnan(kept[places]).any():
                heads = logits_of(teacher, task, [data[int(feature)] for feature in features], precision)
                if task.kind == "qa":  # (features, tokens with padding) of first and last tokens
                    lengths = data.lengths[features]
                    heads = tuple(
                        np.concatenate([row[:length] for row, length in zip(head, lengths, strict=True)])
                        for head in heads
                    )
                    kept[places] = np.stack(heads, axis=-1)
                else:
                    kept[places] = heads[0]
            advance(len(features))
    kept.flush()
    return np.array(kept)


def _open(file: Path, shape: tuple[int, int]) -> np.memmap:
    """The file's array, NaN where nothing was computed; made if it is missing, cut short or of another shape."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)  # r+ would extend a file that was cut short by zeros
        if isinstance(found, np.memmap) and found.shape == shape and found.dtype == np.float32:
            return np.load(file, mmap_mode="r+", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        pass
    file.parent.mkdir(parents=True, exist_ok=True)
    made = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    made[:] = np.nan
    made.flush()
    return made
