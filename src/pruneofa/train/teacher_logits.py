"""A task teacher's logits for all training features, computed once instead of in every epoch.

The teacher is frozen and sees the same tokens in every epoch, so only rounding differs from running it in every step:
its batches have other features. Its hidden states are too many to keep: where they are distilled, it runs in every
step (docs/decisions/0021).
"""

import dataclasses
import errno
import time
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pruneofa.data.features import TaskData, evaluation_batches
from pruneofa.data.tasks import Task
from pruneofa.errors import InputError
from pruneofa.recipe.fields import Precision
from pruneofa.train.device import ROWS, processes, shared_progress
from pruneofa.train.evaluate import evaluating, logits_of

# For each batch of a process's share: logits and the seconds that they took, float32, and the CRC-32 of both.
FILE = "teacher_logits-{rank}-of-{world}"


def with_teacher_logits(
    task: Task, teacher: nn.Module, work: Path, precision: Precision, name: str
) -> tuple[Task, float]:
    """`task` with the logits of `teacher` in its training features, and the seconds that this took in all attempts.

    They are kept in `work`: after an interruption, batches that were computed before are not computed again. Each of
    several processes computes a share, and reads those of the others.

    Args:
        teacher: a model with the task's head, its classes in the task's order, on the device that computes.
        precision: bf16 computes under autocast, as training does.
        name: of the stage, for the progress bar.

    Raises InputError when a logit is NaN or infinite.
    """
    data = task.train
    assert data is not None
    rank, world = processes().process_index, processes().num_processes
    # Not `evaluation_rows`: how much memory a GPU has free must not decide on the last bits.
    batches = list(evaluation_batches(data.lengths, ROWS))
    shares = [(batches[each::world], work / FILE.format(rank=each, world=world)) for each in range(world)]
    _compute(task, data, teacher, *shares[rank], precision, f"{name}: teacher")
    processes().wait_for_everyone()
    logits = np.empty((len(data.ids), 2) if task.kind == "qa" else (len(data), len(task.labels)), np.float32)
    seconds = 0.0
    for each, (share, file) in enumerate(shares):
        with file.open("rb") as kept:
            for features in share:
                places = _places(task, data, features)
                found = _read(kept, logits[places].size + 1)
                if found is None:
                    raise OSError(errno.EIO, "what was written cannot be read back", str(file))
                logits[places] = found[:-1].reshape(len(places), -1)
                seconds += float(found[-1]) if each == rank else 0.0
    if bad := logits.size - np.count_nonzero(np.isfinite(logits)):
        raise InputError(
            f"{name}: {bad} of {logits.size} logits of the teacher are NaN or infinite, wanted numbers; train it "
            "again, or use precision: fp32"
        )
    return dataclasses.replace(task, train=dataclasses.replace(data, teacher_logits=logits)), seconds


def _compute(
    task: Task,
    data: TaskData,
    teacher: nn.Module,
    share: list[NDArray[np.int64]],
    file: Path,
    precision: Precision,
    name: str,
) -> None:
    """Complete the file of these batches from the first one that it does not hold as it was written."""
    classes = 2 if task.kind == "qa" else len(task.labels)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written, not mapped into memory: a full disk then is an error, where a mapped page would kill the process.
    with file.open("a+b") as kept, evaluating(teacher), shared_progress(name, sum(map(len, share))) as advance:
        kept.seek(0)
        for features in share:
            begin, begun = kept.tell(), time.monotonic()
            if _read(kept, len(_places(task, data, features)) * classes + 1) is None:
                kept.truncate(begin)
                logits = _logits(task, data, teacher, features, precision)
                body = np.append(logits, time.monotonic() - begun).astype(np.float32).tobytes()
                kept.write(body + zlib.crc32(body).to_bytes(4, "little"))
                kept.flush()
            advance(len(features))


def _logits(
    task: Task, data: TaskData, teacher: nn.Module, features: NDArray[np.int64], precision: Precision
) -> NDArray[np.float32]:
    """Logits of a batch, (features, classes); in question answering of its tokens without padding, (tokens, 2)."""
    heads = logits_of(teacher, task, [data[int(feature)] for feature in features], precision)
    if task.kind == "classification":
        return heads[0]
    real = np.arange(heads[0].shape[1]) < data.lengths[features][:, None]
    return np.stack([head[real] for head in heads], axis=-1)


def _places(task: Task, data: TaskData, features: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows that the logits of a batch have in the array of all logits."""
    if task.kind == "classification":
        return features
    return np.concatenate([np.arange(*data.bounds[feature : feature + 2]) for feature in features])


def _read(kept: BinaryIO, count: int) -> NDArray[np.float32] | None:
    """The next `count` numbers, or None where the file ends before or does not hold them as they were written."""
    body, check = kept.read(4 * count), kept.read(4)
    if len(body) < 4 * count or check != zlib.crc32(body).to_bytes(4, "little"):
        return None
    return np.frombuffer(body, np.float32)
