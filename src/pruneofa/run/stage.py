"""What a stage is: its identity, the models it takes and gives, its settings, and the fingerprint of it all. No torch.

A stage and the evaluation of its model are steps of their own: whatever changes in how a model is evaluated leaves
its training as it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneofa.formats import scales
from pruneofa.formats.files import fingerprint, read_json
from pruneofa.recipe import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 3  # part of every stage's fingerprint: raise it when a result changes for the same settings, or its record
EVALUATION_FORMAT = 1  # the same for evaluations
# What a field of settings that a later version adds stands for where it is absent: {"Class.field": value}. A field at
# that value is no part of the fingerprint, so that stages which were made without it stay done.
ABSENT: dict[str, Any] = {}

RECORD, METRICS, EVALUATION = "stage.json", "metrics.json", "evaluation.json"
MARK = "fingerprint"  # in the working folder of a stage: which one it was begun for
WORK = ".work"  # in a run's folder: the working folders of its stages

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StageId:
    """Which stage of a run: `variant` of `task` with `seed`; both are None for what is made once, from plain text.

    Variants are those of results.json. `str()` is its name in bars, logs, errors and results.
    """

    task: str | None
    seed: int | None
    variant: str

    @property
    def path(self) -> str:
        """Its folder, relative to the run's."""
        if self.task is None:
            return "sparse" if self.variant == "prune" else self.variant
        return f"tasks/{self.task}/seed-{self.seed}/{'teacher' if self.variant == 'dense' else self.variant}"

    def __str__(self) -> str:
        return self.variant if self.task is None else self.path


@dataclass(frozen=True)
class Model:
    """A model that a stage takes or gives: a folder or hub id, and what it is, as a hash."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class Data:
    """Text or task data that a stage takes: what they say, as a hash, and how to get them."""

    fingerprint: str
    read: Callable[[], Any] = field(repr=False)


@dataclass(frozen=True)
class Job:
    """Where a stage that is made keeps its checkpoints, and whom it tells; `name` as in bars and logs."""

    name: str
    work: Path
    emit: Emit


@dataclass
class Outcome:
    """What a stage made: a model to save, what it cost, and the metrics that its training gives."""

    model: "PreTrainedModel | None" = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    metrics: dict[str, float] | None = None
    seconds: float = 0.0
    tokens: int = 0
    quantization: scales.Quantization | None = None

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder."""
        if self.model is not None and self.tokenizer is not None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.quantization is not None:
            scales.write(folder, self.quantization)


def unused(*names: str) -> Mapping[str, Any]:
    """Metadata of a field of settings that holds a section of the recipe: `names` are not read by the stage."""
    return {"unused": set(names)}


def decisive(settings: Any) -> dict[str, Any]:
    """The settings that decide what a stage makes, defaults too, as plain values.

    Args:
        settings: a dataclass of plain values, sections of the recipe and other such dataclasses. Left out are the
            fields that sections mark as cost, those that are `unused`, and those at the value that ABSENT gives.
    """
    values: dict[str, Any] = {}
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if isinstance(value, Section):
            value = _without_absent(value, value.decisive(exclude=each.metadata.get("unused")))
        elif dataclasses.is_dataclass(value):
            value = decisive(value)
        values[each.name] = value
    return _without_absent(settings, values)


def _without_absent(owner: Any, values: dict[str, Any]) -> dict[str, Any]:
    name = type(owner).__name__
    return {k: v for k, v in values.items() if f"{name}.{k}" not in ABSENT or ABSENT[f"{name}.{k}"] != v}


@dataclass(frozen=True)
class Stage:
    """One model of a run: what it depends on, and how it is made.

    Attributes:
        make: called as `make(settings, job, **inputs)`, data read.
        settings: the very object that `make` is given; see `decisive`.
        inputs: what `make` is given by name; None where there is no such model.
        folder: where the model and its record go.
        work: holds checkpoints until then.
        pattern: path of the model whose zeros the input `model` must have, and the result as well.
    """

    id: StageId
    make: Callable[..., Outcome]
    settings: Any
    inputs: Mapping[str, Model | Data | None]
    folder: Path
    work: Path
    pattern: str | None = None

    @property
    def fingerprint(self) -> str:
        """Changes when a setting or anything upstream changes."""
        used = {"settings": decisive(self.settings), "inputs": self.input_fingerprints}
        return fingerprint({"format": FORMAT, "stage": str(self.id), **used})

    @property
    def input_fingerprints(self) -> dict[str, str | None]:
        """The fingerprint of every input."""
        return {name: value and value.fingerprint for name, value in self.inputs.items()}

    @property
    def model(self) -> Model:
        """What it gives."""
        return Model(str(self.folder), self.fingerprint)

    @property
    def status(self) -> str:
        """done, changed (done with other settings) or run."""
        file = self.folder / RECORD
        if file.exists():
            return "done" if read_json(file).get("fingerprint") == self.fingerprint else "changed"
        return "run"

    @property
    def begun(self) -> str | None:
        """The fingerprint that unfinished work in its working folder was begun with."""
        mark = self.work / MARK
        return mark.read_text(encoding="utf-8") if mark.exists() else None

    @property
    def earlier(self) -> str | None:
        """The version that made the folder, where its record is of an earlier format."""
        file = self.folder / RECORD
        if not file.exists():
            return None
        record = read_json(file)
        if record.get("format", 1) >= FORMAT:
            return None
        return record.get("versions", {}).get("pruneofa", "0.1")

    def __str__(self) -> str:
        return str(self.id)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a stage's model on the validation rows of its task, kept beside the model."""

    stage: Stage
    model: Model  # the stage's own, or the teacher that it was given
    task: Data

    @property
    def id(self) -> StageId:
        """That of the stage."""
        return self.stage.id

    @property
    def folder(self) -> Path:
        """That of the stage."""
        return self.stage.folder

    @property
    def fingerprint(self) -> str:
        """Changes with the model, and with what is evaluated on."""
        inputs = {"stage": self.stage.fingerprint, "model": self.model.fingerprint, "task": self.task.fingerprint}
        return fingerprint({"format": EVALUATION_FORMAT, **inputs})

    @property
    def status(self) -> str:
        """done or run: an evaluation is made again without asking, for nothing is lost."""
        files = [self.folder / EVALUATION, self.folder / METRICS]
        made = self.stage.status == "done" and all(file.exists() for file in files)
        return "done" if made and read_json(files[0]).get("fingerprint") == self.fingerprint else "run"

    def __str__(self) -> str:
        return f"evaluate {self.id}"


Step = Stage | Evaluation
