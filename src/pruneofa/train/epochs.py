"""Metrics after every epoch of a task, on rows held out of training: what one more epoch gives."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pruneofa.data.tasks import Task
from pruneofa.formats.files import read_json, write_json
from pruneofa.train.evaluate import evaluate_model

FILE = "epochs.json"


class EpochCallback(TrainerCallback):
    """Evaluate the student on `task.epoch_rows` after every epoch.

    The metrics of each epoch are kept in the working folder, so that they outlive a kill; an epoch that is trained
    again after one is evaluated again.
    """

    def __init__(self, task: Task, steps: int, work: Path, emit: Callable[[dict[str, Any]], None], stage: str) -> None:
        """`steps` are those of one epoch; `stage` is the name of the stage in bars and events."""
        assert task.epoch_rows is not None
        self.task = dataclasses.replace(task, evaluations={"": task.epoch_rows})
        self.steps, self.file, self.emit, self.stage = steps, work / FILE, emit, stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the last step of an epoch: evaluate, and write what was found."""
        epoch, within = divmod(state.global_step, self.steps)
        if within:
            return
        student = kwargs["model"].student
        metrics = evaluate_model(student, self.task, name=f"{self.stage}, epoch {epoch}").values
        if state.is_world_process_zero:
            write_json(self.file, {"epochs": [*self.found()[: epoch - 1], metrics]})
            self.emit({"event": "epoch", "stage": self.stage, "epoch": epoch, "metrics": metrics})

    def found(self) -> list[dict[str, float]]:
        """The metrics of each epoch so far, in percent."""
        return read_json(self.file)["epochs"] if self.file.exists() else []
