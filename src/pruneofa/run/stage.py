"""Stages: identity, input and output models, settings, and the fingerprint of all these. No torch.

A stage and the evaluation of its model are separate steps, so that a change in the evaluation does not require new
training.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneofa.errors import InputError, short
from pruneofa.formats import scales
from pruneofa.formats.files import fingerprint, is_number, read_json
from pruneofa.formats.settings import copy_sentence
from pruneofa.recipe import RESOURCES_ONLY, Section
from pruneofa.report.schema import METRIC_NAMES
from pruneofa.run.names import RECORD, StageId

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of every stage's fingerprint: increase it when results change for the same settings, or the record.
FORMAT = 2
ABSENT = "not there"  # in a record, a setting that the stage does not read
EVALUATION_FORMAT = 1  # the same for evaluations

METRICS, EVALUATION = "metrics.json", "evaluation.json"
ROWS = "metric_rows.npz"  # the terms of the rows, by which models are compared; see `pruneofa.train.metrics`
_FIELDS: dict[str, Any] = {
    "format": int, "fingerprint": str, "settings": dict, "inputs": dict, "versions": dict, "tokens": int,
    "seconds": int | float, "output": str, "made_from": dict,
}  # fmt: skip
MARK = "fingerprint"  # file in a stage's working folder: what the work was begun with, `Stage.mark`
WORK = ".work"  # folder in a run's folder: the working folders of its stages

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Model:
    """An input or output model of a stage: a folder or hub id, and the fingerprint of its contents.

    The model of a stage has that stage's fingerprint, of what goes into it: its weights do not exist yet.
    """

    path: str
    fingerprint: str
    stage: "Stage | None" = field(default=None, repr=False, compare=False)

    @property
    def output(self) -> str | None:
        """The fingerprint of the weights that a stage made, from its record; None if no stage made them yet.

        So it is for a record of another format: nothing is known of those weights.
        """
        if self.stage is None or not (self.stage.folder / RECORD).exists() or self.stage.other_format is not None:
            return None
        return read_record(self.stage.folder, ("output",))["output"]


@dataclass(frozen=True)
class LazyData:
    """Text or task data that a stage reads: the fingerprint of their contents, and a function that loads them."""

    fingerprint: str
    read: Callable[[], Any] = field(repr=False)


@dataclass(frozen=True)
class Job:
    """The execution of a stage: folder of its checkpoints, receiver of its events, and its `name` in bars and logs."""

    name: str
    work: Path
    emit: Emit


@dataclass
class Outcome:
    """The result of a stage: a model to save, its cost, the metrics of its training, and those after every epoch.

    `sentence` is a sentence-transformers folder whose settings the model keeps: then it gives the same kind of vectors.
    """

    model: "PreTrainedModel | None" = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    metrics: dict[str, float] | None = None
    seconds: float = 0.0
    tokens: int = 0
    quantization: scales.Quantization | None = None
    epochs: list[dict[str, float]] | None = None
    sentence: Path | None = None

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder."""
        if self.model is not None and self.tokenizer is not None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.sentence is not None:
            copy_sentence(self.sentence, folder)
        if self.quantization is not None:
            scales.write(folder, self.quantization)


def read_record(folder: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The record of the stage that made `folder`; only its format, if that is another: its fields may mean anything.

    Raises InputError, as `read_json` does, and for a field that no stage writes so, or that is `needed` and missing.
    """
    record = read_json(folder / RECORD)
    if isinstance(found := record.get("format", 0), int) and found != FORMAT:
        record = {"format": found}
    check_fields(record, folder / RECORD, _FIELDS, needed, "the folder to make it again")
    return record


def check_fields(
    record: Mapping[str, Any], file: Path, kinds: Mapping[str, Any], needed: tuple[str, ...], what: str
) -> None:
    """Raises InputError for a field that is not of its kind, or `needed` and missing; `what` may be deleted instead."""
    for name, kind in kinds.items():
        value = record.get(name)
        if (name in record or name in needed) and not isinstance(value, kind):
            raise InputError(
                f"{file}: {name} is {short(value)}, which no stage writes; restore the file, or delete {what}"
            )


def check_metrics(metrics: Mapping[str, Any], file: Path) -> None:
    """Raises InputError for metrics, which `file` holds, that are no numbers, or beyond 100 %."""
    for name, value in metrics.items():
        percent = name in METRIC_NAMES
        if not is_number(value) or (percent and not 0 <= value <= 100):
            wanted = "a number from 0 to 100" if percent else "a number"
            raise InputError(
                f"{file}: {name} is {short(value)}, wanted {wanted}; restore the file, or delete it to evaluate again"
            )


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics of the model in `folder`. Raises InputError as `read_json` does, and for what is no number."""
    metrics = read_json(folder / METRICS)
    if not metrics:
        raise InputError(f"{folder / METRICS}: no metrics in it; restore the file, or delete it to evaluate again")
    check_metrics(metrics, folder / METRICS)
    return metrics


def unused(*names: str, also: Callable[[Any], Iterable[str]] = lambda _: ()) -> Mapping[str, Any]:
    """Metadata for a settings field that holds a section of the recipe: the stage does not read the fields `names`.

    `also` gives further ones, by what the section says.
    """
    return {"unused": lambda section: {*names, *also(section)}}


def fingerprinted(settings: Any) -> dict[str, Any]:
    """The settings that determine the result of a stage, including defaults, as plain values.

    Args:
        settings: a dataclass of plain values, sections of the recipe and other such dataclasses. Fields that sections
            or metadata mark as RESOURCES_ONLY, and `unused` fields, are omitted.
    """
    values: dict[str, Any] = {}
    for each in dataclasses.fields(settings):
        if each.metadata == RESOURCES_ONLY:
            continue
        value = getattr(settings, each.name)
        if isinstance(value, Section):
            value = value.fingerprinted(exclude=each.metadata.get("unused", lambda _: set())(value))
        elif dataclasses.is_dataclass(value):
            value = fingerprinted(value)
        values[each.name] = value
    return values


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as JSON gives them back."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": json.loads(json.dumps(value))}
    return found


@dataclass(frozen=True)
class Stage:
    """One model of a run: its dependencies, and how it is made.

    Attributes:
        make: called as `make(settings, job, **inputs)`, with data loaded.
        settings: the object that is passed to `make`; see `fingerprinted`.
        inputs: models and data that are passed to `make` by name; None for an optional model that is not used.
        folder: destination of the model and its record.
        work: folder of checkpoints while the stage is in progress.
        pattern: path of the model whose zeros both the input `model` and the result must have.
    """

    id: StageId
    make: Callable[..., Outcome]
    settings: Any
    inputs: Mapping[str, Model | LazyData | None]
    folder: Path
    work: Path
    pattern: str | None = None

    @property
    def fingerprint(self) -> str:
        """Changes when a setting or anything upstream changes."""
        used = {"settings": fingerprinted(self.settings), "inputs": self.input_fingerprints}
        return fingerprint({"format": FORMAT, "stage": str(self.id), **used})

    @property
    def input_fingerprints(self) -> dict[str, str | None]:
        """The fingerprint of every input."""
        return {name: value.fingerprint if value else None for name, value in self.inputs.items()}

    @property
    def model(self) -> Model:
        """The model that the stage makes."""
        return Model(str(self.folder), self.fingerprint, self)

    @property
    def status(self) -> str:
        """One of done, changed (done with other settings or inputs, or in another format) and run."""
        if not (self.folder / RECORD).exists():
            return "run"
        same = read_record(self.folder).get("fingerprint") == self.fingerprint
        return "done" if same and not self.remade_inputs else "changed"

    @property
    def made_from(self) -> dict[str, str]:
        """`Model.output` of the inputs that stages made."""
        models = {name: value.output for name, value in self.inputs.items() if isinstance(value, Model)}
        return {name: output for name, output in models.items() if output is not None}

    @property
    def remade_inputs(self) -> list[str]:
        """The input models that were made again since this stage was, or will be: the fingerprints cannot tell."""
        then, now = read_record(self.folder).get("made_from", {}), self.made_from
        others = {name for name in now if then.get(name) != now[name]}
        models = {name: value.stage for name, value in self.inputs.items() if isinstance(value, Model)}
        return [name for name, stage in models.items() if name in others or (stage and stage.status != "done")]

    def differences(self) -> list[str]:
        """What differs between the finished stage's record and the settings and inputs of now, a phrase for each."""
        record = read_record(self.folder)
        then, now = (_flat(settings) for settings in (record.get("settings", {}), fingerprinted(self.settings)))
        names = [name for name in {**then, **now} if then.get(name, ABSENT) != now.get(name, ABSENT)]
        found = [f"{name} was {then.get(name, ABSENT)}, is {now.get(name, ABSENT)}" for name in names]
        before = record.get("inputs", {})
        others = [name for name, value in self.input_fingerprints.items() if before.get(name) != value]
        found += [f"other {name}" for name in others]
        return found + [self._remade(name) for name in self.remade_inputs if name not in others]

    def _remade(self, name: str) -> str:
        model = self.inputs[name]
        gone = isinstance(model, Model) and not Path(model.path).exists()
        return f"{name} is gone: put {model.path} back" if gone else f"{name} made again"

    @property
    def mark(self) -> str:
        """What the work is begun with: the fingerprint, and that of the weights that other stages made for it."""
        made_from = self.made_from
        return f"{self.fingerprint} {fingerprint(made_from)}" if made_from else self.fingerprint

    @property
    def begun(self) -> bool:
        """Whether there is unfinished work in the working folder."""
        return (self.work / MARK).exists()

    @property
    def begun_otherwise(self) -> bool:
        """Whether that work was begun with other settings or inputs."""
        return self.begun and (self.work / MARK).read_text(encoding="utf-8", errors="replace") != self.mark

    @property
    def other_format(self) -> int | None:
        """The format of the finished stage's record if it is not FORMAT, else None."""
        made = (self.folder / RECORD).exists()
        found = read_record(self.folder)["format"] if made else FORMAT
        return None if found == FORMAT else found

    def __str__(self) -> str:
        return str(self.id)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a stage's model on the validation rows of its task, kept beside the model."""

    stage: Stage
    model: Model  # the model of the stage, or the given teacher
    task: LazyData

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
        """Changes with the model and with the evaluation data."""
        inputs = {"stage": self.stage.fingerprint, "model": self.model.fingerprint, "task": self.task.fingerprint}
        return fingerprint({"format": EVALUATION_FORMAT, **inputs})

    @property
    def status(self) -> str:
        """One of done and run: an outdated evaluation is redone without asking, because nothing is lost."""
        files = [self.folder / EVALUATION, self.folder / METRICS]
        made = self.stage.status == "done" and all(file.exists() for file in files)
        return "done" if made and read_json(files[0]).get("fingerprint") == self.fingerprint else "run"

    def __str__(self) -> str:
        return f"evaluate {self.id}"


Step = Stage | Evaluation
