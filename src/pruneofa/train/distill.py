"""Distillation losses: pure functions of logits and hidden states, and a head that never stores all logits.

Losses are returned as *sums*, so that a training step can add them over micro-batches and ranks; the caller divides
by a count taken over the whole optimizer step. Only `kd_loss`, which users call in their own loops, is a mean.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits that exist at once. CPU seconds of head + losses on 2,048 MiniLM positions in bf16 (fp32), one
# thread, slices of 16: 128 rows 1.6 (2.0), 256 rows 1.2 (1.8), 512 rows 1.05 (1.9), 1024 rows 0.93 (1.9) for
# twice the memory.
CHUNK_ROWS = 512
# On a CPU the softmax passes run over slices that stay in the second-level cache: with 512 rows, slices of 4
# take 0.91 (1.71), of 16 1.05 (1.92), of 64 1.11 (1.97).
CPU_SLICE_ROWS = 4


def kd_terms(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, classes: Tensor | None = None
) -> Tensor:
    """T²·KL(teacher ‖ student) of every position, summed over classes.

    Args:
        student_logits: (..., classes) of any float type.
        teacher_logits: the same shape; it gets no gradient.
        temperature: T above 0. T² keeps the size of the gradient independent of T.
        classes: bool, broadcastable to the logits; False classes are ignored in both models, also if their
            values are NaN. A position without any class contributes 0.

    Returns:
        (...) float32 (float64 for float64 logits).

    Raises:
        ValueError: the shapes differ or the temperature is not above 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"kd_loss: student logits have shape {tuple(student_logits.shape)} but the teacher's have "
            f"{tuple(teacher_logits.shape)}; both models need the same classes and the same inputs"
        )
    if not temperature > 0:
        raise ValueError(f"kd_loss: temperature is {temperature} but must be above 0; 2 is the usual choice")
    kind = _softmax_dtype(student_logits.dtype)
    student, teacher = student_logits.to(kind) / temperature, teacher_logits.detach().to(kind) / temperature
    if classes is not None:
        # A finite value, because -inf would give 0·inf = NaN in the backward pass of log_softmax.
        lowest = torch.finfo(kind).min
        student, teacher = student.masked_fill(~classes, lowest), teacher.masked_fill(~classes, lowest)
    log_student, log_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    difference = log_teacher - log_student
    if classes is not None:
        difference = difference.masked_fill(~classes, 0)
    return (log_teacher.exp() * difference).sum(-1) * temperature**2


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    *,
    rows: Tensor | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    """T²·KL(teacher ‖ student): summed over classes, mean over all leading dimensions.

    With T = 1 and equal logits it is 0. Unlike `KLDivLoss(reduction="batchmean")`, which divides by the first
    dimension only, (batch, seq, classes) logits give the mean per position.

    Args:
        student_logits: (..., classes) of any float type.
        teacher_logits: the same shape.
        temperature: T above 0.
        rows: bool of the leading shape; only True positions count (for example the non-padding ones).
        classes: bool, broadcastable to the logits; False classes are dropped (for example padded tokens, in
            question answering, where tokens are the classes).

    Returns:
        A scalar, float32 or float64; 0 when no position is selected.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not above 0.
    """
    if rows is not None:
        if rows.shape != student_logits.shape[:-1]:
            raise ValueError(
                f"kd_loss: rows has shape {tuple(rows.shape)} but the logits' leading shape is "
                f"{tuple(student_logits.shape[:-1])}; pass one bool per position"
            )
        if classes is not None:
            classes = classes.expand_as(student_logits)[rows]
        student_logits, teacher_logits = student_logits[rows], teacher_logits[rows]
    terms = kd_terms(student_logits, teacher_logits, temperature, classes=classes)
    return terms.sum() / max(terms.numel(), 1)


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], rows: Tensor | None = None, *, relative: bool = False
) -> Tensor:
    """Squared error between hidden states, mean over layers and width, *sum* over the selected positions.

    Divided by the number of selected positions it is the mean squared error; the caller divides, so that
    micro-batches of different padding add up exactly.

    Args:
        student: one (..., width) tensor per layer, usually the embedding output and every layer's output.
        teacher: the same shapes; no gradient flows into it.
        rows: bool (...), True at the positions that count. The values elsewhere may be anything, even NaN.
        relative: divide the squared error of a position by the mean square of the teacher's state there, so that
            layers count alike whatever the size of their states.

    Raises:
        ValueError: the numbers of layers or the shapes differ.
    """
    if [state.shape for state in student] != [state.shape for state in teacher]:
        raise ValueError(
            f"hidden_loss: the student has {len(student)} states of {tuple(student[0].shape)}, the teacher "
            f"{len(teacher)} of {tuple(teacher[0].shape)}; depth and width must be equal"
        )
    errors = []
    for state, target in zip(student, teacher, strict=True):
        kind = _softmax_dtype(state.dtype)
        difference = state.to(kind) - target.detach().to(kind)
        if rows is not None:
            difference = difference.masked_fill(~rows.unsqueeze(-1), 0)
        if relative:
            size = target.detach().to(kind).square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
            difference = difference / (size if rows is None else size.masked_fill(~rows.unsqueeze(-1), 1))
        errors.append(difference.square().sum() / state.shape[-1])
    return torch.stack(errors).mean()


class HeadLosses(NamedTuple):
    """The result of `fused_head_losses`: three scalars, of which only `loss` has a gradient."""

    loss: Tensor
    hard: Tensor
    kd: Tensor


def fused_head_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor | None = None,
    hard_scale: float | Tensor = 1.0,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
    temperature: float = 1.0,
    kd_scale: float | Tensor = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> HeadLosses:
    """Cross-entropy and T²·KL of a vocabulary head, without ever holding the logits of all positions.

    For each chunk of rows the forward pass computes student and teacher logits, both losses, and the gradients with
    respect to `hidden`, `weight` and `bias`, so that the logits can be freed before the next chunk. The backward
    pass only scales these gradients. Matrix products run in the autocast dtype where autocast is on, softmax in
    float32 (float64 for float64 inputs). `loss = hard_scale·hard + kd_scale·kd`; the scales are inputs and
    not factors applied later, because both gradients are accumulated in one buffer.

    Args:
        hidden: (rows, width), the input of the decoder: the rows that have a label first, then the others.
        weight: (vocabulary, width).
        bias: (vocabulary) or None.
        labels: int64 (m), m ≤ rows: the labels of the first m rows. None or empty: no hard loss.
        hard_scale: weight of the hard loss, usually weight / count; a 0-d tensor avoids a device sync.
        teacher: (hidden (rows, width'), weight (vocabulary, width'), bias) of the teacher, used for every row;
            None for no distillation.
        temperature: T of the distillation.
        kd_scale: weight of the distillation loss; must not be 0 (pass no teacher instead).
        chunk_rows: rows of logits that exist at once.

    Returns:
        `loss` (with gradient), and the unscaled sums `hard` and `kd` (without), float32 or float64 scalars.

    Raises:
        ValueError: labels that do not fit the rows, or a teacher of another vocabulary.
    """
    count = 0 if labels is None else labels.numel()
    if count > hidden.shape[0] or (teacher is None and count < hidden.shape[0]):
        raise ValueError(
            f"fused_head_losses: {count} labels for {hidden.shape[0]} rows; without a teacher every row needs a "
            "label, with one the labelled rows come first"
        )
    if teacher is not None and teacher[1].shape[0] != weight.shape[0]:
        raise ValueError(
            f"fused_head_losses: the teacher's vocabulary has {teacher[1].shape[0]} entries, the student's "
            f"{weight.shape[0]}; distillation needs the same vocabulary"
        )
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    sources = (hidden, weight) if bias is None else (hidden, weight, bias)
    loss, hard, kd = _FusedHead.apply(
        hidden,
        weight,
        bias,
        labels,
        teacher,
        float(temperature) if teacher is not None else 1.0,
        hard_scale,
        kd_scale,
        chunk_rows,
        dtype,
        torch.is_grad_enabled() and any(source.requires_grad for source in sources),
    )
    return HeadLosses(loss, hard, kd)


class _FusedHead(torch.autograd.Function):
    """See `fused_head_losses`. Works on x = hidden / T, so that one product yields the logits z / T."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        temperature: float,
        hard_scale: float | Tensor,
        kd_scale: float | Tensor,
        chunk_rows: int,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            kind = _softmax_dtype(dtype)
            x, w, b = _scaled(hidden, weight, bias, temperature, dtype)
            logits = x.new_empty(min(chunk_rows, len(x)), len(w))  # reused: fresh memory costs page faults
            # The gradient of a chunk is (p_student - p_teacher) + ratio·(p - onehot); `factor` is applied to
            # the summed gradients in backward, which saves a pass over every chunk of logits.
            factor, ratio = hard_scale * temperature, 1.0
            scaled = teacher_logits = None
            if teacher is not None:
                factor, ratio = kd_scale * temperature**2, hard_scale / (kd_scale * temperature)
                scaled = _scaled(*teacher, temperature, dtype)
                teacher_logits = torch.empty_like(logits)
            sums = torch.zeros(2, dtype=torch.float64, device=x.device)
            grad_x = grad_w = grad_b = None
            if needs_grad:
                grad_x = torch.empty_like(x, dtype=kind)
                grad_w = torch.zeros_like(w, dtype=kind) if weight.requires_grad else None
                grad_b = torch.zeros_like(b) if b is not None and bias is not None and bias.requires_grad else None
            for start in range(0, len(x), chunk_rows):
                rows = slice(start, start + chunk_rows)
                z = torch.mm(x[rows], w.t(), out=logits[: len(x[rows])])
                targets = None
                if scaled is not None and teacher_logits is not None:
                    teacher_x, teacher_w, teacher_b = scaled
                    part = teacher_x[rows]
                    targets = (torch.mm(part, teacher_w.t(), out=teacher_logits[: len(part)]), teacher_b)
                wanted = None if labels is None else labels[rows]
                sums += _replace_by_gradient(z, b, targets, wanted, temperature, ratio, grad_b)
                if grad_x is not None:
                    grad_x[rows] = z @ w
                if grad_w is not None:
                    _add_product(grad_w, z.t(), x[rows])
            hard, kd = (sums * sums.new_tensor([1.0, temperature**2])).to(kind).unbind()
        if needs_grad:
            ctx.save_for_backward(grad_x, grad_w, grad_b)
            ctx.factor, ctx.temperature = factor, temperature
            ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(hard, kd)
        return hard_scale * hard + (kd_scale * kd if teacher is not None else 0.0), hard, kd

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad_loss: Tensor, _hard: Tensor, _kd: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_x, grad_w, grad_b = ctx.saved_tensors
        scale = (grad_loss * ctx.factor).to(grad_x.dtype)
        hidden_dtype, weight_dtype = ctx.dtypes
        # Out of place: a second backward over a retained graph must find the saved gradients unchanged.
        grad_hidden = (grad_x * (scale / ctx.temperature)).to(hidden_dtype)
        grad_weight = None if grad_w is None else (grad_w * scale).to(weight_dtype)
        grad_bias = None if grad_b is None else (grad_b * (scale / ctx.temperature)).to(weight_dtype)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 8


def _replace_by_gradient(
    logits: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor, Tensor | None] | None,
    labels: Tensor | None,
    temperature: float,
    ratio: float | Tensor,
    grad_bias: Tensor | None,
) -> Tensor:
    """Overwrite logits (rows, vocabulary), here without bias and divided by T, with their gradient.

    Adds the gradient's column sums to `grad_bias`; returns both sums of losses, float64 (2), KD without T².
    """
    sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
    step = CPU_SLICE_ROWS if logits.device.type == "cpu" else max(len(logits), 1)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        scores = _with_bias(logits[rows], bias)
        gradient = None
        if teacher is not None:
            log_student = F.log_softmax(scores, dim=-1)
            log_teacher = F.log_softmax(_with_bias(teacher[0][rows], teacher[1]), dim=-1)
            teacher_p = log_teacher.exp()
            sums[1] += torch.dot(teacher_p.view(-1), log_teacher.sub_(log_student).view(-1))
            gradient = log_student.exp_().sub_(teacher_p)
        wanted = None if labels is None else labels[rows].unsqueeze(-1)
        if wanted is not None and len(wanted):
            log_p = F.log_softmax(scores[: len(wanted)] * temperature, dim=-1)
            sums[0] -= log_p.gather(-1, wanted).sum()
            p = log_p.exp_()
            p.scatter_add_(-1, wanted, p.new_full(wanted.shape, -1))
            if gradient is None:
                gradient = p
            else:
                gradient[: len(wanted)] += p.mul_(ratio)
        assert gradient is not None, "neither labels nor a teacher"
        logits[rows] = gradient
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
    return sums


def _with_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in the dtype of the softmax; the bias is added in that dtype, on the slice that is in the cache."""
    return logits.to(_softmax_dtype(logits.dtype)) if bias is None else logits + bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` may be of a wider type than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _scaled(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden / T, weight, bias / T) of a linear layer, whose output is then z / T; the bias in the softmax dtype."""
    bias = None if bias is None else bias.to(_softmax_dtype(dtype)) / temperature
    return (hidden / temperature).to(dtype), weight.to(dtype), bias


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
