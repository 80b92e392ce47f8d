"""Training objectives: the losses of a student, distilled from a teacher that is not part of the saved model.

Both objectives have the same interface. `counts(batch)` returns the numbers of items and positions in a micro-batch.
The trainer adds them up over all micro-batches and ranks of one optimizer step and passes the totals to
`forward(batch, counts)`, which divides every loss sum by its total. So gradient accumulation and the number of ranks
change only rounding. (DDP averages gradients: the trainer multiplies the loss by the number of ranks.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruneofa.data.examples import IGNORED
from pruneofa.data.tasks import token_types
from pruneofa.errors import InputError
from pruneofa.train.distill import fused_head_losses, hidden_loss, kd_terms
from pruneofa.train.heads import next_sentence_head, next_sentence_logits, vocabulary_head
from pruneofa.train.micro_batches import Batch


def model_inputs(model: nn.Module, batch: Batch) -> Batch:
    """What `model` takes of a batch: token types only if it has several, as another model of the batch may."""
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if token_types(cast(Any, model.config)) > 1 else ()))
    return {name: batch[name] for name in names if name in batch}


class Objective(nn.Module):
    """A student and a frozen teacher; the teacher follows the module's device but is not in its state_dict."""

    counts: Callable[[Batch], Tensor]

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__()
        self.student = student
        # A tuple, because nn.Module would register a plain attribute as a submodule and save it.
        self._outside = () if teacher is None else (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The teacher, in eval mode and without gradients; None when nothing is distilled."""
        return self._outside[0] if self._outside else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for teacher in self._outside:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


class PretrainingObjective(Objective):
    """MLM (+ NSP), distillation of their logits, distillation of hidden states.

    `loss = hard·(mlm + nsp) + kd·(kd + kd_nsp) + hidden·mse`. Vocabulary logits are computed only at the
    positions that need them and in chunks (see `distill`); with `hard = kd = 0` not at all. `hidden`
    compares the embedding output, every layer's output, and the pooler's output where both models have one
    (without it, hidden-only distillation would prune the pooler and never train it). A pooled vector counts like one
    of a position: in a mean of their own these few would weigh as much as a layer, and their noise would dominate the
    gradient of the encoder (docs/decisions/0003).

    Parameters that no loss reaches (heads with `hard = kd = 0`, the pooler without NSP and `hidden`) get
    `requires_grad = False` here, so that DDP does not wait for their gradients and AdamW does not decay them.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        hard: float,
        kd: float,
        hidden: float,
        temperature: float,
        positions: Literal["all", "masked"],
        nsp: bool,
        hidden_norm: bool = False,
    ) -> None:
        """Check that the models fit together, and freeze parameters that no loss depends on.

        Args:
            student: a model with a vocabulary head (...ForPreTraining, ...ForMaskedLM).
            teacher: the same architecture and vocabulary; needed when `kd` or `hidden` is above 0.
            hard: weight of the MLM and NSP losses.
            kd: weight of the distillation of their logits.
            hidden: weight of the mean squared error of hidden states.
            hidden_norm: divide it, for each position and layer, by the mean square of the teacher's state.
            temperature: T of the distillation.
            positions: distil the MLM logits at all non-padding positions, or at the masked ones only.
            nsp: whether there is a next-sentence loss.

        Raises:
            InputError: no vocabulary or NSP head, a teacher that is missing, or of another vocabulary, depth
                or width.
        """
        super().__init__(student, teacher if kd or hidden else None)
        self.hard, self.kd, self.hidden, self.temperature = hard, kd, hidden, temperature
        self.positions, self.nsp, self.hidden_norm = positions, nsp, hidden_norm
        # Not a method: data loaders in other processes call it, and must not be given the models with it.
        self.counts: Callable[[Batch], Tensor] = partial(pretraining_counts, positions=positions)
        _check_pair(student, teacher, logits=kd > 0, hidden=hidden > 0)
        for model in (student, self.teacher):
            if model is not None and (hard or kd):
                vocabulary_head(model)
                if nsp and next_sentence_head(model) is None:
                    raise InputError(
                        f"{type(model).__name__} has no next-sentence head but corpus.nsp is true; "
                        "set corpus.nsp: false, or load a model for pre-training"
                    )
        self._freeze_unused()

    def forward(self, batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Losses of a micro-batch as its share of an optimizer step.

        Args:
            batch: input_ids, attention_mask (batch, seq), token_type_ids where the model has them, labels
                (-100 where nothing was masked) and next_sentence_label (batch) with NSP.
            counts: `counts` of all micro-batches of the step, added up.

        Returns:
            Scalars: "loss" (with gradient) and, detached, those of "mlm", "nsp", "kd", "kd_nsp", "hidden"
            whose weight is not 0.
        """
        masked, distilled, items, tokens = counts.clamp(min=1).to(batch["input_ids"].device, torch.float32).unbind()
        states = self._run(self.student, batch)
        targets = None
        if self.teacher is not None:
            with torch.no_grad():
                targets = self._run(self.teacher, batch)
        parts: dict[str, Tensor] = {}
        losses = []
        if self.hard or self.kd:
            losses.append(self._vocabulary(batch, states, targets, masked, distilled, parts))
            if self.nsp:
                losses.append(self._next_sentence(batch, states, targets, items, parts))
        if self.hidden and targets is not None:
            parts["hidden"] = self._states(_mask(batch), states, targets, tokens)
            losses.append(self.hidden * parts["hidden"])
        return {"loss": torch.stack(losses).sum(), **{name: part.detach() for name, part in parts.items()}}

    def _run(self, model: PreTrainedModel, batch: Batch) -> Any:
        inputs = model_inputs(model, batch)
        return model.base_model(**inputs, output_hidden_states=bool(self.hidden), return_dict=True)

    def _vocabulary(
        self,
        batch: Batch,
        states: Any,
        targets: Any,
        masked: Tensor,
        distilled: Tensor,
        parts: dict[str, Tensor],
    ) -> Tensor:
        labels = batch["labels"].flatten()
        mask = _mask(batch).flatten()
        labelled = (labels != IGNORED) & mask
        rows = labelled.nonzero().squeeze(-1)
        labels = labels[rows]
        if self.kd and self.positions == "all":
            rows = torch.cat([rows, (mask & ~labelled).nonzero().squeeze(-1)])
        transform, decoder = vocabulary_head(self.student)
        teacher = None
        if self.kd and self.teacher is not None:
            with torch.no_grad():
                teacher_transform, teacher_decoder = vocabulary_head(self.teacher)
                teacher_hidden = teacher_transform(targets.last_hidden_state.flatten(0, 1)[rows])
            teacher = (teacher_hidden, teacher_decoder.weight, teacher_decoder.bias)
        result = fused_head_losses(
            transform(states.last_hidden_state.flatten(0, 1)[rows]),
            decoder.weight,
            decoder.bias,
            labels=labels if self.hard else None,
            hard_scale=self.hard / masked,
            teacher=teacher,
            temperature=self.temperature,
            kd_scale=self.kd / distilled,
        )
        if self.hard:
            parts["mlm"] = result.hard / masked
        if self.kd:
            parts["kd"] = result.kd / distilled
        return result.loss

    def _next_sentence(
        self, batch: Batch, states: Any, targets: Any, items: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        logits = next_sentence_logits(self.student, states.pooler_output)
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.hard:
            labels = batch["next_sentence_label"]
            parts["nsp"] = F.cross_entropy(logits.float(), labels, reduction="sum") / items
            loss = loss + self.hard * parts["nsp"]
        if self.kd and self.teacher is not None:
            with torch.no_grad():
                teacher_logits = next_sentence_logits(self.teacher, targets.pooler_output)
            parts["kd_nsp"] = kd_terms(logits, teacher_logits, self.temperature).sum() / items
            loss = loss + self.kd * parts["kd_nsp"]
        return loss

    def _states(self, mask: Tensor, states: Any, targets: Any, tokens: Tensor) -> Tensor:
        layers = len(states.hidden_states)
        relative = self.hidden_norm
        mse = hidden_loss(states.hidden_states, targets.hidden_states, mask, relative=relative) / tokens
        pooled, wanted = _pooled(states), _pooled(targets)
        if pooled is not None and wanted is not None:
            mse = mse + hidden_loss([pooled], [wanted], relative=relative) / (tokens * layers)
        return mse

    def _freeze_unused(self) -> None:
        heads = bool(self.hard or self.kd)
        unused: set[int] = set()
        if not heads:
            unused |= _ids(self.student) - _ids(self.student.base_model)  # a tied decoder is the embedding
        elif not self.nsp:
            unused |= _ids(next_sentence_head(self.student))
        pooler_distilled = self.hidden and self.teacher is not None and _ids(_pooler(self.teacher))
        if not (heads and self.nsp) and not pooler_distilled:
            unused |= _ids(_pooler(self.student))
        for parameter in self.student.parameters():
            if id(parameter) in unused:
                parameter.requires_grad_(False)


class TransferObjective(Objective):
    """A task's own loss and distillation from a dense task teacher: `hard·hard + kd·kd + hidden·mse`.

    `hidden` compares the embedding output and every layer's output, as in `PretrainingObjective`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        kind: Literal["classification", "qa"],
        hard: float,
        kd: float,
        temperature: float,
        hidden: float = 0.0,
    ) -> None:
        """Check that teacher and student fit.

        Args:
            student: a sequence-classification or question-answering model.
            teacher: the same kind of model with the same labels; needed when `kd` is above 0.
            kind: "classification" distils the class logits; "qa" the start and end logits (half each), over
                the non-padding tokens.
            hard: weight of the cross-entropy with the labels; in "qa" over the non-padding tokens.
            kd: weight of the distillation.
            temperature: T of the distillation.
            hidden: weight of the mean squared error of hidden states; teacher and student need equal depth
                and width.

        Raises:
            InputError: a teacher is missing or has other classes.
        """
        super().__init__(student, teacher if kd or hidden else None)
        self.kind, self.hard, self.kd, self.temperature, self.hidden = kind, hard, kd, temperature, hidden
        self.counts: Callable[[Batch], Tensor] = transfer_counts
        if (kd or hidden) and teacher is None:
            raise InputError("kd or hidden is above 0 but there is no teacher; give one, or set both to 0 and hard: 1")
        _check_pair(student, teacher, logits=False, hidden=hidden > 0)
        if self.teacher is not None and kind == "classification":
            wanted, got = student.config.num_labels, self.teacher.config.num_labels
            if got != wanted:
                raise InputError(f"the teacher has {got} classes but the task has {wanted}; use a teacher of this task")

    def distil_from_batches(self) -> None:
        """Take the teacher's logits from the batches from now on, and release the teacher.

        Raises InputError where hidden states are distilled.
        """
        if self.hidden:
            raise InputError("hidden is above 0, so the teacher is needed in every step; set hidden: 0, or keep it")
        self._outside = ()

    def forward(self, batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Losses of a micro-batch as its share of an optimizer step.

        Args:
            batch: input_ids, attention_mask (batch, seq), token_type_ids where the model has them, and labels
                (batch), or start_positions and end_positions (batch); after `distil_from_batches` also
                teacher_logits (batch, classes), or (batch, seq, 2).
            counts: `counts` of all micro-batches of the step, added up.

        Returns:
            Scalars: "loss" (with gradient) and, detached, those of "hard", "kd" and "hidden" whose weight is
            not 0.
        """
        items, tokens = counts.clamp(min=1).to(batch["input_ids"].device, torch.float32).unbind()
        options = {"return_dict": True, "output_hidden_states": bool(self.hidden)}
        outputs = self.student(**model_inputs(self.student, batch), **options)
        classes = _mask(batch) if self.kind == "qa" else None
        parts: dict[str, Tensor] = {}
        loss = outputs[self._names()[0]].new_zeros((), dtype=torch.float32)
        if self.hard:
            keys = ("start_positions", "end_positions") if self.kind == "qa" else ("labels",)
            logits = [outputs[name].float() for name in self._names()]
            if classes is not None:  # transformers' own loss counts padding as possible answers
                logits = [each.masked_fill(~classes, torch.finfo(each.dtype).min) for each in logits]
            terms = [F.cross_entropy(each, batch[key], reduction="sum") for each, key in zip(logits, keys, strict=True)]
            parts["hard"] = torch.stack(terms).mean() / items
            loss = loss + self.hard * parts["hard"]
        targets: Any = None
        if self.teacher is not None:
            with torch.no_grad():
                targets = self.teacher(**model_inputs(self.teacher, batch), **options)
        if self.kd:
            if targets is not None:
                wanted = [targets[name] for name in self._names()]
            else:
                kept = batch["teacher_logits"]
                wanted = kept.unbind(-1) if self.kind == "qa" else (kept,)
            terms = [
                kd_terms(outputs[name], logits, self.temperature, classes=classes).sum()
                for name, logits in zip(self._names(), wanted, strict=True)
            ]
            parts["kd"] = torch.stack(terms).mean() / items
            loss = loss + self.kd * parts["kd"]
        if targets is not None and self.hidden:
            parts["hidden"] = hidden_loss(outputs.hidden_states, targets.hidden_states, _mask(batch)) / tokens
            loss = loss + self.hidden * parts["hidden"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _names(self) -> tuple[str, ...]:
        return ("start_logits", "end_logits") if self.kind == "qa" else ("logits",)


def pretraining_counts(batch: Batch, positions: Literal["all", "masked"]) -> Tensor:
    """Float64 (4): masked positions, positions with distilled logits, items, non-padding positions."""
    mask = _mask(batch)
    labelled = (batch["labels"] != IGNORED) & mask if "labels" in batch else torch.zeros_like(mask)
    masked, tokens = labelled.sum(), mask.sum()
    distilled = masked if positions == "masked" else tokens
    items = masked.new_tensor(mask.shape[0])
    return torch.stack([masked, distilled, items, tokens]).double()


def transfer_counts(batch: Batch) -> Tensor:
    """Float64 (2): items, non-padding positions."""
    mask = _mask(batch)
    tokens = mask.sum()
    return torch.stack([tokens.new_tensor(mask.shape[0]), tokens]).double()


def _pooler(model: PreTrainedModel) -> nn.Module | None:
    return getattr(model.base_model, "pooler", None)


def _ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(parameter) for parameter in module.parameters()}


def _pooled(states: Any) -> Tensor | None:
    return getattr(states, "pooler_output", None)


def _mask(batch: Batch) -> Tensor:
    """Bool (batch, seq), True at non-padding positions."""
    if "attention_mask" not in batch:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return batch["attention_mask"].bool()


def _check_pair(student: PreTrainedModel, teacher: PreTrainedModel | None, *, logits: bool, hidden: bool) -> None:
    if not (logits or hidden):
        return
    if teacher is None:
        raise InputError("distill.kd or distill.hidden is above 0 but there is no teacher; give one, or set both to 0")
    keys = (["vocab_size"] if logits else []) + (["num_hidden_layers", "hidden_size"] if hidden else [])
    for key in keys:
        wanted, got = getattr(student.config, key), getattr(teacher.config, key)
        if got != wanted:
            raise InputError(
                f"distill: the student's {key} is {wanted} but the teacher's is {got}; they must be equal"
                + ("; set distill.hidden: 0 to distil logits only" if key != "vocab_size" else "")
            )
