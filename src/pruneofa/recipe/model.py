"""A recipe: the sections of its tasks, and all settings of a run with their types, defaults and limits."""

import difflib
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pruneofa.errors import InputError
from pruneofa.recipe.fields import (
    SAVE_MINUTES_FIELD,
    SKIP_ZEROS_FIELD,
    Fraction,
    Names,
    Positive,
    Precision,
    Rate,
    Section,
    Seed,
    Weight,
)
from pruneofa.recipe.pretraining import Corpus, Distill, Prune, Teacher

GLUE = ("sst2", "mnli", "qnli", "qqp")
KNOWN_TASKS = (*GLUE, "squad")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # names of runs and tasks, which become parts of paths


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
    save_minutes: Rate = SAVE_MINUTES_FIELD
    skip_zeros: bool = SKIP_ZEROS_FIELD
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
    tasks: dict[str, Task] = Field({}, description="the tasks by name: sst2, mnli, qnli, qqp, squad, or your own")
    quantize: Quantize | None = Field(None, description="null: the task models stay float32")
    seeds: list[Seed] = Field([0, 1], min_length=1, description="seeds of fine-tuning; results are their means")
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
