"""The sections of a recipe: every setting of a run with its type, default and limits."""

import difflib
import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pruneofa.errors import InputError

GLUE = ("sst2", "mnli", "qnli", "qqp")
KNOWN_TASKS = (*GLUE, "squad")

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy's generator takes
Names = str | list[str]
COST: dict[str, Any] = {"cost": True}  # marks a field that costs time or memory only: it may change within a stage
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of runs and tasks: it becomes part of a path
RATE_WARNING = 1.2  # the published schedule reaches 1.02


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, and so are values of another type (1 for 1.0 is fine)."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True)

    def decisive(self, include: set[str] | None = None, exclude: set[str] | None = None) -> dict[str, Any]:
        """The values that decide what a stage makes, defaults too: all fields but those marked COST.

        `include` names the only fields wanted, `exclude` those that the stage does not use.
        """
        costs = {name for name, field in type(self).model_fields.items() if field.json_schema_extra == COST}
        return self.model_dump(include=include, exclude=costs | (exclude or set()))


class Corpus(Section):
    """Plain text for teacher preparation and pruning."""

    source: Names = Field(description="hub data set id, or local file(s)/folder(s): parquet, jsonl, txt (.gz, .zst)")
    config: str | None = Field(None, description="hub configuration, such as 20231101.en")
    column: str = Field("text", description="column that holds the text")
    max_length: Annotated[int, Field(ge=8)] = Field(128, description="tokens per example, special tokens included")
    nsp: bool = Field(True, description="segment pairs with next-sentence prediction; false: documents")
    short_seq_prob: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="share of shorter examples")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of articles held out")
    whole_word: bool = Field(False, description="mask whole words instead of single word pieces")
    streaming: bool = Field(False, description="read while training instead of tokenizing once to a cache")


class _Optimization(Section):
    """What teacher preparation and pruning have in common."""

    steps: Positive = Field(100_000, description="optimizer steps")
    lr: Rate = Field(5e-5, description="peak learning rate")
    batch: Positive = Field(256, description="examples per optimizer step, over all processes")
    micro_batch: Positive | None = Field(
        None, description="examples per forward pass and process (default: batch)", json_schema_extra=COST
    )
    warmup: Fraction = Field(0.01, description="share of the steps with rising learning rate")
    weight_decay: Weight = Field(0.01, description="of AdamW; biases and norms have none")
    max_grad_norm: Weight = Field(1.0, description="gradient clipping; 0 switches it off")
    dropout: Fraction | None = Field(None, description="replaces the model's dropout rates; null keeps them")
    checkpoint_activations: bool = Field(
        False, description="recompute activations in the backward pass", json_schema_extra=COST
    )
    save_steps: Positive | None = Field(
        None, description="steps between checkpoints (default: a twentieth)", json_schema_extra=COST
    )


class Teacher(_Optimization):
    """Teacher preparation: MLM (+ NSP) training of the dense model on the corpus."""


class Prune(_Optimization):
    """Student pruning: gradual magnitude pruning with distillation and learning-rate rewinding.

    With score hessian the weights are pruned at once, before the first step: begin, end, stop, interval, initial and
    rewind are not used, and the steps train what is left with its pattern locked.
    """

    score: Literal["magnitude", "hessian"] = Field(
        "magnitude", description="gradual, smallest weights; or at once, layer by layer, by what their inputs need"
    )
    calibration: Positive = Field(512, description="examples that score hessian sees")
    begin: Annotated[int, Field(ge=0)] = Field(0, description="first step at which weights are pruned")
    end: Positive | None = Field(None, description="step at which the final sparsity is reached (default: half)")
    stop: Positive | None = Field(None, description="last step that may select the mask anew (default: 80 %)")
    interval: Positive | None = Field(None, description="steps between selections (default: a hundredth)")
    final: Fraction = Field(0.9, description="final sparsity of the encoder's linear weights")
    initial: Fraction = Field(0.0, description="sparsity from which it rises, at begin")
    pattern: Annotated[str, Field(pattern=r"^(unstructured|4x1|1x4|\d+:\d+)$")] = Field(
        "unstructured", description="unstructured, 4x1 (4 output rows), 1x4 (4 inputs) or n:m such as 2:4"
    )
    scope: Literal["uniform", "global"] = Field("uniform", description="same sparsity per layer, or one threshold")
    skip: list[str] = Field([], description="regular expressions of layers to leave dense")
    rewind: Literal["sawtooth", "cyclic", "none"] = Field("sawtooth", description="learning-rate rewinding")

    @model_validator(mode="after")
    def _schedule(self) -> "Prune":
        self.end = self.end or max(1, self.steps // 2)
        self.stop = self.stop or max(self.end, self.steps * 4 // 5)
        self.interval = self.interval or max(1, self.steps // 100)
        if not self.begin < self.end:
            raise ValueError(f"begin is {self.begin} but must be below end ({self.end})")
        if not self.end <= self.stop <= self.steps:
            raise ValueError(f"stop is {self.stop} but must be between end ({self.end}) and steps ({self.steps})")
        if self.initial > self.final:
            raise ValueError(f"initial is {self.initial} but must not exceed final ({self.final})")
        gradual = self.score == "magnitude"
        if (
            gradual
            and self.rewind == "sawtooth"
            and self.end - self.begin >= self.steps - int(self.steps * self.warmup)
        ):
            raise ValueError(
                f"end - begin is {self.end - self.begin} of {self.steps} steps and leaves none for the learning "
                "rate to decay; lower end or raise steps"
            )
        if gradual and self.rewind == "sawtooth" and (peak := self._peak_rate()) > RATE_WARNING:
            warnings.warn(
                f"prune: rewinding raises the learning rate to {peak:.2f} times lr, {peak * self.lr:.3g}; "
                "lower lr, warmup or end if that is not wanted",
                stacklevel=2,
            )
        if self.score == "hessian" and self.scope == "global":
            raise ValueError("score hessian prunes layer by layer; set scope to uniform")
        if ":" in self.pattern:
            kept, group = map(int, self.pattern.split(":"))
            if not 0 < kept < group or abs(self.final - (1 - kept / group)) > 1e-9:
                raise ValueError(
                    f"final is {self.final} but pattern {self.pattern} gives {1 - kept / max(group, 1):g}; "
                    "set prune.final to that"
                )
        return self

    def _peak_rate(self) -> float:
        """The highest multiple that schedule.rewound_lr reaches; its last rewinding ends at `end`."""
        assert self.end is not None
        warmup = int(self.steps * self.warmup)
        return (self.steps - max(self.end, warmup)) / (self.steps - (self.end - self.begin) - warmup)


class Distill(Section):
    """Weights of the losses in the prune stage."""

    hard: Weight = Field(0.5, description="weight of the MLM (+ NSP) loss")
    kd: Weight = Field(0.5, description="weight of the distillation of logits")
    temperature: Rate = Field(2.0, description="softens both sides of the distillation of logits")
    hidden: Weight = Field(0.0, description="weight of the MSE between hidden states, all layers")
    positions: Literal["all", "masked"] = Field("all", description="positions whose MLM logits are distilled")

    @model_validator(mode="after")
    def _some_weight(self) -> "Distill":
        if self.hard + self.kd + self.hidden == 0:
            raise ValueError("hard, kd and hidden are all 0: nothing would be learned; raise one of them")
        return self


class Task(Section):
    """A downstream task. Defaults that are null here follow the task's kind (see `resolved`)."""

    data: Names | None = Field(None, description="hub id, folder of parquet splits, or a CSV/TSV/JSONL/parquet file")
    validation: str | None = Field(None, description="validation file (default: the data's own split, else 10 %)")
    text: Names | None = Field(None, description="one or two text columns")
    label: str | None = Field(None, description="label column")
    epochs: Positive | None = Field(None, description="passes over the training rows (default: 9, SQuAD 8)")
    lr: Rate | None = Field(None, description="peak learning rate (default: 1e-4, SQuAD 1.5e-4)")
    batch: Positive | None = Field(None, description="examples per optimizer step (default: 32, SQuAD 12)")
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="tokens per example, special tokens included (default: 128, SQuAD 384)"
    )
    stride: Annotated[int, Field(ge=0)] | None = Field(None, description="overlap of question-answering windows")
    warmup: Fraction = Field(0.0, description="share of the steps with rising learning rate")
    weight_decay: Weight = Field(0.0, description="of AdamW; biases and norms have none")
    max_grad_norm: Weight = Field(1.0, description="gradient clipping; 0 switches it off")
    hard: Weight = Field(0.0, description="weight of the task's own loss in transfer")
    kd: Weight = Field(1.0, description="weight of the distillation from the dense task teacher")
    hidden: Weight = Field(0.0, description="weight of the MSE between their hidden states, all layers")
    temperature: Rate = Field(2.0, description="softens both sides of the distillation of logits")
    dropout: Fraction | None = Field(None, description="of the sparse model in transfer (default: as in its config)")
    teacher: str | None = Field(
        None, description="dense model of the task; without: run fine-tunes one, transfer learns from the labels alone"
    )
    dense_epochs: Positive | None = Field(None, description="epochs of that fine-tuning (default: epochs)")
    dense_lr: Rate | None = Field(None, description="its learning rate (default: lr)")
    qat_epochs: Positive | None = Field(None, description="epochs of quantization-aware training (default: 3, SQuAD 2)")
    qat_lr: Rate | None = Field(None, description="its peak learning rate (default: 1e-5)")
    qat_rows: Positive | None = Field(None, description="rows of each of its epochs, drawn at random (default: all)")
    train_rows: Positive | None = Field(None, description="use only the first rows, for trials")
    validation_rows: Positive | None = Field(None, description="evaluate on the first rows only, for trials")
    skip_bad_answers: bool = Field(False, description="drop SQuAD answers whose offsets do not match")

    @model_validator(mode="after")
    def _head_is_trained(self) -> "Task":
        if self.hard + self.kd == 0:
            raise ValueError("hard and kd are both 0: the task's head would not be trained; raise one of them")
        return self

    def resolved(self, name: str) -> "Task":
        """Fill the defaults of method.md A6: GLUE 9 epochs, 1e-4, 32 x 128; SQuAD 8, 1.5e-4, 12 x 384/128.

        Quantization-aware training: 3 epochs, SQuAD 2, 1e-5.
        """
        squad = name == "squad"
        defaults = (
            {"epochs": 8, "lr": 1.5e-4, "batch": 12, "max_length": 384, "stride": 128, "qat_epochs": 2}
            if squad
            else {"epochs": 9, "lr": 1e-4, "batch": 32, "max_length": 128, "qat_epochs": 3}
        )
        task = self.model_copy(update={k: v for k, v in defaults.items() if getattr(self, k) is None})
        return task.model_copy(
            update={
                "dense_epochs": task.dense_epochs or task.epochs,
                "dense_lr": task.dense_lr or task.lr,
                "qat_lr": task.qat_lr or 1e-5,
            }
        )


class Quantize(Section):
    """int8 for the task models: quantization-aware training, and post-training quantization to compare with."""

    weights: Literal["channel", "tensor"] = Field("channel", description="a scale per output row, or per weight")
    activations: Literal["static", "dynamic"] = Field("static", description="scales learned once, or per token")
    embeddings: bool = Field(
        True, description="int8 embedding tables too, a scale per row; false: float here, but pack makes them int8"
    )
    freeze: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="share of the steps after which static scales stay as they are; 1: never"
    )
    ptq: bool = Field(True, description="also quantize without training, to see what training buys")
    calibration: Positive = Field(256, description="training examples that post-training static scales come from")
    observer: Literal["minmax", "percentile"] = Field("minmax", description="how they come from them")
    percentile: Annotated[float, Field(gt=50, lt=100)] = Field(
        99.99, description="of observer percentile: per cent of the numbers that lie below the range's end"
    )


class Control(Section):
    """The comparison model: pruned once, locked, trained for the prune stage's tokens."""

    tasks: list[str] | None = Field(None, description="tasks to transfer it to (default: all)")
    lr: Annotated[list[Rate], Field(min_length=1)] | None = Field(
        None, description="learning rates tried, lowest validation loss wins (default: prune.lr and twice that)"
    )


class Card(Section):
    """What the model card says and the run cannot know."""

    license: str = Field("apache-2.0", description="identifier that the hub knows")
    authors: str | None = None
    base_model: str | None = Field(None, description="hub id of the starting model (default: model, if it is one)")
    version: str = Field("1", description="text, so in quotes")
    language: Annotated[list[str], Field(min_length=1)] = Field(["en"], description="ISO codes")


class Recipe(Section):
    """One row of the published table, from raw text to model card."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    model: str = Field(description="folder or hub id of the encoder")
    model_is_sparse: bool = Field(False, description="start from an existing sparse model: no teacher, no prune")
    dense_model: str | None = Field(None, description="with model_is_sparse: where dense task teachers start")
    data_root: str | None = Field(None, description="relative data paths are resolved here")
    corpus: Corpus | None = None
    teacher: Teacher | None = Field(None, description="null: the model itself is the teacher, without further training")
    prune: Prune | None = None
    distill: Distill = Distill()
    tasks: dict[str, Task] = {}
    quantize: Quantize | None = Field(None, description="null: the task models stay float32")
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1]
    seed: Seed = Field(0, description="seed of teacher preparation and pruning")
    control: Control | bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    card: Card = Card()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.model_is_sparse and (self.prune or self.teacher):
            raise ValueError("model_is_sparse is true, so teacher and prune must be null")
        if (self.prune or self.teacher) and not self.corpus:
            raise ValueError("teacher and prune need a corpus; set corpus.source")
        if not self.model_is_sparse and not self.prune:
            raise ValueError("there is nothing to prune with: add a prune section, or set model_is_sparse: true")
        if self.control is True:
            self.control = Control()
        if self.control and not self.prune:
            raise ValueError("control compares with the prune stage, which this recipe does not have")
        if self.control and self.prune and self.control.lr is None:
            # A rate far below the prune stage's would make the control lose for that alone.
            self.control = self.control.model_copy(update={"lr": [self.prune.lr, 2 * self.prune.lr]})
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat a seed; give each once")
        for name, task in self.tasks.items():
            check_task_name(name)
            if name not in KNOWN_TASKS and not (task.data and task.text and task.label):
                near = difflib.get_close_matches(name, KNOWN_TASKS, 1)
                raise ValueError(
                    f"task {name!r} is not one of {', '.join(KNOWN_TASKS)}"
                    + (f" (did you mean {near[0]!r}?)" if near else "")
                    + "; your own task needs data, text and label"
                )
        for name in (self.control.tasks or []) if self.control else []:
            if name not in self.tasks:
                raise ValueError(f"control.tasks names {name!r}, which is not in tasks")
        return self


def check_task_name(name: str) -> None:
    """Raises InputError, which is a ValueError, for a name that cannot be the name of a folder everywhere."""
    if not re.fullmatch(NAME, name):
        raise InputError(f"task name {name!r}: wanted letters, digits, '.', '_' and '-', the first a letter or digit")
