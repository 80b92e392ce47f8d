"""The sections of a recipe on plain text: corpus, teacher preparation, pruning and its losses."""

import warnings
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pruneofa.recipe.fields import (
    RESOURCES_ONLY,
    SAVE_MINUTES_FIELD,
    SKIP_ZEROS_FIELD,
    Fraction,
    Names,
    Positive,
    Rate,
    Section,
    Weight,
)

RATE_WARNING = 1.2  # multiple of lr above which to warn; the published schedule reaches 1.02
# Scores whose selections change the weights that stay, cost as much as hundreds of steps, and end with the ramp.
REFITTED = ("obs", "hessian")


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
    save_minutes: Rate = SAVE_MINUTES_FIELD


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
    skip_zeros: bool = SKIP_ZEROS_FIELD

    @model_validator(mode="after")
    def _schedule(self) -> "Prune":
        for name, value in self.default_schedule().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.steps == 0 and not self.at_once:
            raise ValueError("steps is 0 but pruning is gradual; raise steps, or set prune.one_shot=true")
        self._check_schedule()
        if ":" in self.pattern:
            kept, group = map(int, self.pattern.split(":"))
            if not 0 < kept < group or abs(self.final - (1 - kept / group)) > 1e-9:
                raise ValueError(
                    f"final is {self.final} but pattern {self.pattern} gives {1 - kept / max(group, 1):g}; "
                    "set prune.final to that"
                )
        return self

    def default_schedule(self) -> dict[str, int]:
        """What `end`, `stop` and `interval` are where they are not given."""
        end = max(1, self.steps // 2)
        interval = max(1, self.steps // (10 if self.score in REFITTED else 100))
        return {"end": end, "stop": max(self.end or end, self.steps * 4 // 5), "interval": interval}

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
