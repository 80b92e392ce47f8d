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
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the seeds that NumPy's generator accepts
Names = str | list[str]
Precision = Literal["bf16", "fp32"]
RESOURCES_ONLY: dict[str, Any] = {"in_fingerprint": False}  # marks a field that affects time or memory but not results
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # names of runs and tasks, which become parts of paths
SAVE_MINUTES = 5.0  # training that a kill can cost; copying the state for a checkpoint stops training for a moment
RATE_WARNING = 1.2  # multiple of lr above which to warn; the published schedule reaches 1.02


class Section(BaseModel):
    """A section. Unknown keys, NaN, infinity and values of another type are errors, except an integer for a float."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)

    def fingerprinted(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """The values that affect a stage's results, with defaults: all fields except those marked RESOURCES_ONLY.

        `exclude`: fields that the stage does not use.
        """
        excluded = {
            name for name, field in type(self).model_fields.items() if field.json_schema_extra == RESOURCES_ONLY
        }
        return self.model_dump(exclude=excluded | (exclude or set()))


class Corpus(Section):
    """Plain text for teacher preparation and pruning."""

    source: Names = Field(description="hub data set id, or local file(s)/folder(s): parquet, jsonl, txt, csv, tsv")
    config: str | None = Field(None, description="hub configuration, such as 20231101.en")
    column: str = Field("text", description="column that holds the text")
    max_length: Annotated[int, Field(ge=8)] = Field(128, description="tokens per example, special tokens included")
    nsp: bool = Field(True, description="segment pairs with next-sentence prediction; false: documents")
    short_seq_prob: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="fraction of shorter examples")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="fraction of articles held out for validation"
    )
    whole_word: bool = Field(False, description="mask whole words instead of single word pieces")
    streaming: bool = Field(False, description="read while training instead of tokenizing once to a cache")


_SAVE_MINUTES = Field(
    SAVE_MINUTES, description="minutes between checkpoints; one is written at the end too",
    json_schema_extra=RESOURCES_ONLY,
)  # fmt: skip
_SKIP_ZEROS = Field(
    True, description="with a locked pattern, fp32 on a CPU: do not multiply by zeros; false: compute as a dense model",
    json_schema_extra=RESOURCES_ONLY,
)  # fmt: skip
# Scores whose selections change the weights that stay, cost as much as hundreds of steps, and end with the ramp.
REFITTED = ("obs", "hessian")


class _Optimization(Section):
    """Settings that teacher preparation and pruning share."""

    steps: Positive = Field(100_000, description="optimizer steps")
    lr: Rate = Field(5e-5, description="peak learning rate")
    batch: Positive = Field(256, description="examples per optimizer step, over all processes")
    micro_batch: Positive | None = Field(
        None, description="examples per forward pass and process (default: batch)", json_schema_extra=RESOURCES_ONLY
    )
    warmup: Fraction = Field(0.01, description="fraction of the steps for linear warmup of the learning rate")
    weight_decay: Weight = Field(0.01, description="weight decay of AdamW; not applied to biases and norms")
    max_grad_norm: Weight = Field(1.0, description="gradient clipping: maximum norm; 0: no clipping")
    dropout: Fraction | None = Field(None, description="dropout rate; null: those of the model's config")
    checkpoint_activations: bool = Field(
        False, description="recompute activations in the backward pass", json_schema_extra=RESOURCES_ONLY
    )
    save_steps: Positive | None = Field(
        None,
        description="steps between checkpoints (default: by time, see save_minutes)",
        json_schema_extra=RESOURCES_ONLY,
    )
    save_minutes: Rate = _SAVE_MINUTES


class Teacher(_Optimization):
    """Teacher preparation: MLM (+ NSP) training of the dense model on the corpus."""


class Prune(_Optimization):
    """Student pruning: gradual pruning with distillation and learning-rate rewinding.

    With one_shot all weights are pruned before the first step, and the steps, if there are any, train the remaining
    weights with the pattern locked. begin, end, stop, interval, initial and rewind are then not used.
    """

    steps: Annotated[int, Field(ge=0)] = Field(100_000, description="optimizer steps; 0, with one_shot: no training")
    score: Literal["magnitude", "fisher", "obs", "hessian"] = Field(
        "magnitude",
        description="magnitude: smallest weights first; fisher: times their curvature; obs: second order in blocks, "
        "updates the other weights; hessian: layer by layer, without gradients, fits the other weights",
    )
    one_shot: bool | None = Field(None, description="prune at once, before the steps (default: with score hessian)")
    calibration: Positive = Field(512, description="calibration examples for score hessian")
    gradients: Positive = Field(
        1024, description="gradients, each of 4 examples, for score obs, and for score fisher in one shot"
    )
    block: Annotated[int, Field(ge=2, le=1024)] = Field(
        50, description="weights per block of the second-order matrix of score obs; memory grows with it"
    )
    dampening: Rate = Field(0.01, description="added to the diagonal of that matrix, relative to its mean in a layer")
    begin: Annotated[int, Field(ge=0)] = Field(0, description="step at which the schedule begins")
    end: Positive | None = Field(
        None, description="step at which the final sparsity is reached (default: half of steps)"
    )
    stop: Positive | None = Field(
        None, description="last step at which the mask may change (default: 80 % of steps; obs, hessian: end)"
    )
    interval: Positive | None = Field(
        None, description="steps between mask updates (default: a hundredth of steps; obs, hessian: a tenth)"
    )
    final: Fraction = Field(0.9, description="final sparsity of the encoder's linear weights")
    initial: Fraction = Field(0.0, description="sparsity at begin")
    pattern: Annotated[str, Field(pattern=r"^(unstructured|4x1|1x4|\d+:\d+)$")] = Field(
        "unstructured", description="unstructured, 4x1 (4 output rows), 1x4 (4 inputs) or n:m such as 2:4"
    )
    scope: Literal["uniform", "global"] = Field(
        "uniform", description="uniform: the same sparsity in every layer; global: one threshold"
    )
    skip: list[str] = Field([], description="regular expressions of layers to leave dense")
    rewind: Literal["sawtooth", "cyclic", "none"] = Field(
        "sawtooth", description="sawtooth, cyclic or none: learning-rate rewinding after each mask update"
    )
    skip_zeros: bool = _SKIP_ZEROS

    @model_validator(mode="after")
    def _schedule(self) -> "Prune":
        self.end = self.end or max(1, self.steps // 2)
        self.stop = self.stop or max(self.end, self.steps * 4 // 5)
        self.interval = self.interval or max(1, self.steps // (10 if self.score in REFITTED else 100))
        if self.steps == 0 and not self.at_once:
            raise ValueError("steps is 0 but pruning is gradual; raise steps, or set one_shot: true")
        self._check_schedule()
        if ":" in self.pattern:
            kept, group = map(int, self.pattern.split(":"))
            if not 0 < kept < group or abs(self.final - (1 - kept / group)) > 1e-9:
                raise ValueError(
                    f"final is {self.final} but pattern {self.pattern} gives {1 - kept / max(group, 1):g}; "
                    "set prune.final to that"
                )
        return self

    @property
    def at_once(self) -> bool:
        """Whether all weights are pruned before the first step."""
        return self.score == "hessian" if self.one_shot is None else self.one_shot

    def _check_schedule(self) -> None:
        assert self.end is not None and self.stop is not None
        if self.at_once:
            return
        if not self.begin < self.end:
            raise ValueError(f"begin is {self.begin} but must be below end ({self.end})")
        if not self.end < self.steps:  # the last step begins at steps - 1: nothing would be selected at end
            raise ValueError(f"end is {self.end} but must be below steps ({self.steps})")
        if not self.end <= self.stop <= self.steps:
            raise ValueError(f"stop is {self.stop} but must be between end ({self.end}) and steps ({self.steps})")
        if self.initial > self.final:
            raise ValueError(f"initial is {self.initial} but must not exceed final ({self.final})")
        if self.rewind != "sawtooth":
            return
        if self.end - self.begin >= self.steps - int(self.steps * self.warmup):
            raise ValueError(
                f"end - begin is {self.end - self.begin} of {self.steps} steps, which leaves none for the "
                "learning rate to decay; lower end or raise steps"
            )
        if (peak := self._peak_rate()) > RATE_WARNING:
            warnings.warn(
                f"prune: rewinding raises the learning rate to {peak:.2f} times lr, {peak * self.lr:.3g}; "
                "lower lr, warmup or end to avoid that",
                stacklevel=3,
            )

    def _peak_rate(self) -> float:
        """The highest multiple that schedule.rewound_lr reaches; its last rewinding ends at `end`."""
        assert self.end is not None
        warmup = int(self.steps * self.warmup)
        return (self.steps - max(self.end, warmup)) / (self.steps - (self.end - self.begin) - warmup)


class Distill(Section):
    """Weights of the losses in the prune stage."""

    hard: Weight = Field(0.5, description="weight of the MLM (+ NSP) loss")
    kd: Weight = Field(0.5, description="weight of the distillation of logits")
    temperature: Rate = Field(2.0, description="temperature of the logit distillation")
    hidden: Weight = Field(0.0, description="weight of the MSE between hidden states, all layers")
    hidden_norm: bool = Field(False, description="divide that of each layer by the size of the teacher's states")
    positions: Literal["all", "masked"] = Field(
        "all", description="all or masked: positions whose MLM logits are distilled"
    )

    @model_validator(mode="after")
    def _some_weight(self) -> "Distill":
        if self.hard + self.kd + self.hidden == 0:
            raise ValueError("hard, kd and hidden are all 0, so there is no loss to train on; raise one of them")
        return self


class Task(Section):
    """A downstream task. Fields that are null get their defaults by the kind of task (see `resolved`)."""

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
    warmup: Fraction = Field(0.0, description="fraction of the steps for linear warmup of the learning rate")
    weight_decay: Weight = Field(0.0, description="weight decay of AdamW; not applied to biases and norms")
    max_grad_norm: Weight = Field(1.0, description="gradient clipping: maximum norm; 0: no clipping")
    hard: Weight = Field(0.0, description="weight of the task's own loss (default: 0; without a teacher 1)")
    kd: Weight = Field(1.0, description="weight of the distillation of logits (default: 1; without a teacher 0)")
    hidden: Weight = Field(0.0, description="weight of the MSE between hidden states, all layers")
    temperature: Rate = Field(2.0, description="temperature of the logit distillation")
    dropout: Fraction | None = Field(None, description="dropout rate in transfer (default: that of the model's config)")
    freeze_embeddings: bool = Field(
        False, description="do not train the word embeddings: faster, and more accurate with few labelled rows"
    )
    teacher: str | None = Field(
        None,
        description="dense teacher of the task; {seed} in its path becomes the seed "
        "(default: run fine-tunes one, the single verbs use the labels only)",
    )
    dense_epochs: Positive | None = Field(
        None, description="epochs of the dense teacher's fine-tuning (default: epochs)"
    )
    dense_lr: Rate | None = Field(None, description="learning rate of the dense teacher's fine-tuning (default: lr)")
    qat_epochs: Positive | None = Field(None, description="epochs of quantization-aware training (default: 3, SQuAD 2)")
    qat_lr: Rate | None = Field(None, description="peak learning rate of quantization-aware training (default: 1e-5)")
    qat_rows: Positive | None = Field(
        None, description="random rows per epoch of quantization-aware training (default: all)"
    )
    check_epochs: bool = Field(
        False,
        description="hold a tenth of the training rows out and evaluate on it after every epoch, to choose epochs by",
    )
    train_rows: Positive | None = Field(None, description="train on the first rows only, for trials")
    validation_rows: Positive | None = Field(None, description="evaluate on the first rows only, for trials")
    save_minutes: Rate = _SAVE_MINUTES
    skip_zeros: bool = _SKIP_ZEROS
    skip_bad_answers: bool = Field(False, description="drop SQuAD answers whose offsets do not match")

    @model_validator(mode="after")
    def _head_is_trained(self) -> "Task":
        if self.hard + self.kd == 0:
            raise ValueError("hard and kd are both 0, so the task's head would not be trained; raise one of them")
        return self

    def resolved(self, name: str) -> "Task":
        """Fill the published defaults (docs/method.md, "Transfer").

        GLUE and other tasks: 9 epochs, lr 1e-4, batch 32, length 128. SQuAD: 8 epochs, lr 1.5e-4, batch 12, length 384,
        stride 128. Quantization-aware training: 3 epochs (SQuAD 2), lr 1e-5.
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
    """int8 task models: quantization-aware training, and post-training quantization for comparison."""

    weights: Literal["channel", "tensor"] = Field(
        "channel", description="one scale per output row (channel) or per weight matrix (tensor)"
    )
    activations: Literal["static", "dynamic"] = Field(
        "static", description="static: fixed scales learned in training; dynamic: one per token"
    )
    embeddings: bool = Field(
        True, description="train with int8 embedding tables, a scale per row; false: float, but pack makes them int8"
    )
    freeze: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="fraction of the steps after which static scales are frozen; 1: never"
    )
    ptq: bool = Field(True, description="also quantize without training, for comparison")
    calibration: Positive = Field(256, description="training examples that calibrate static scales after training")
    observer: Literal["minmax", "percentile"] = Field(
        "minmax", description="minmax or percentile: how calibration determines a range"
    )
    percentile: Annotated[float, Field(gt=50, lt=100)] = Field(
        99.99, description="for observer percentile: a range is from percentile 100 - p to p"
    )


class Control(Section):
    """The comparison model: pruned once, locked, and trained on as many tokens as the prune stage."""

    tasks: list[str] | None = Field(None, description="tasks to transfer it to (default: all)")
    lr: Annotated[list[Rate], Field(min_length=1)] | None = Field(
        None, description="learning rates to try; the lowest validation loss is kept (default: prune.lr and twice that)"
    )


class Card(Section):
    """Entries of the model card that a run cannot determine."""

    license: str = Field("apache-2.0", description="license identifier of the Hugging Face hub")
    authors: str | None = None
    base_model: str | None = Field(None, description="hub id of the starting model (default: model, if it is one)")
    version: str = Field("1", description="version of the model; a string, so quote it in YAML")
    language: Annotated[list[str], Field(min_length=1)] = Field(["en"], description="ISO codes")


class Recipe(Section):
    """A complete run, from plain text to model card."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    model: str = Field(description="folder or hub id of the encoder")
    model_is_sparse: bool = Field(False, description="start from an existing sparse model: no teacher, no prune")
    dense_model: str | None = Field(
        None, description="with model_is_sparse: the model from which dense task teachers are fine-tuned"
    )
    data_root: str | None = Field(None, description="folder to which relative data paths refer")
    corpus: Corpus | None = None
    teacher: Teacher | None = Field(None, description="null: the model itself is the teacher, without further training")
    prune: Prune | None = None
    distill: Distill = Distill()
    tasks: dict[str, Task] = {}
    quantize: Quantize | None = Field(None, description="null: the task models stay float32")
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1]
    seed: Seed = Field(0, description="seed of teacher preparation and pruning")
    control: Control | bool = False
    precision: Precision = "bf16"
    card: Card = Card()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.model_is_sparse and (self.prune or self.teacher):
            raise ValueError("model_is_sparse is true, so teacher and prune must be null")
        if (self.prune or self.teacher) and not self.corpus:
            raise ValueError("teacher and prune need a corpus; set corpus.source")
        if not self.model_is_sparse and not self.prune:
            raise ValueError("the recipe has no prune section; add one, or set model_is_sparse: true")
        if self.control is True:
            self.control = Control()
        if self.control and not (self.prune and self.prune.steps):
            raise ValueError(
                "control needs a prune section that trains to compare with; add one, or set control: false"
            )
        if self.control and self.prune and self.control.lr is None:
            # With a learning rate far below the prune stage's, the control would be worse for that reason only.
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
                raise ValueError(f"control.tasks names {name!r}, not one of tasks; correct it, or set control=false")
        return self


def check_task_name(name: str) -> None:
    """Raises InputError, which is a ValueError, for a name that is not a valid folder name on every system."""
    if not re.fullmatch(NAME, name):
        raise InputError(f"task name {name!r}: wanted letters, digits, '.', '_' and '-', the first a letter or digit")
