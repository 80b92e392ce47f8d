"""Layer-wise pruning with second-order information, in one shot: every linear keeps what its inputs need.

Each linear layer of the student is fitted so that it gives, on the inputs that it really gets behind the layers pruned
before it, what the dense teacher's layer gives, with only the wanted share of non-zero weights:

    min over W with the mask:  mean ||x W^T - y||^2 + damping ||W - W_dense||^2

x are the student's inputs and y the teacher's outputs; where a residual connection follows, y also makes good what the
residual has lost. The mask is found by ADMM on this problem and the weights by conjugate gradients within the mask, as
in ALPS (Meng et al. 2024, arXiv 2406.07831). Only forward passes are needed: minutes on a CPU for a small encoder.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruneofa import families
from pruneofa.errors import CheckFailed
from pruneofa.families.family import Layer
from pruneofa.progress import progress
from pruneofa.train.masks import canonical_name, check_shape, magnitude_mask, prunable

DAMPING = 0.01  # share of the mean squared input that is added to the diagonal
ROUNDS = 30  # of ADMM
FIRST_PENALTY, LAST_PENALTY = 0.03, 30.0  # of ADMM, rising geometrically; the inputs are scaled to variance 1
SAME_PENALTY = 5  # rounds with one penalty, which share one inverse
FITS = 20  # steps of conjugate gradients

Select = Callable[[Tensor], Tensor]


@torch.no_grad()
def prune_layerwise(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    final: float,
    pattern: str = "unstructured",
    skip: Iterable[str] = (),
) -> None:
    """Prune `student` in place, layer after layer; linears and their biases are fitted to `teacher`'s outputs.

    Needs memory for the layers' inputs and outputs of all batches, about 40 bytes per token and hidden unit.

    Args:
        student: starts as a copy of `teacher`; both are put into evaluation mode.
        teacher: the dense model.
        batches: {"input_ids", "attention_mask", …} of text, on the models' device; some thousand tokens at least.
        final: sparsity of every pruned weight, 0 to 1.
        pattern: as of `masks.magnitude_mask`.
        skip: regular expressions of weights that stay dense.

    Raises:
        InputError: no encoder in the model, or a weight that does not divide into the pattern.
        CheckFailed: the fit of a layer is not finite.
    """
    wanted = {canonical_name(name) for name in prunable(student, skip)}
    for name, weight in prunable(student, skip).items():
        check_shape(name, tuple(weight.shape), pattern)

    def select(scores: Tensor) -> Tensor:
        return magnitude_mask(scores, final, pattern)

    student.eval()
    teacher.eval()
    family = families.of(student.config.model_type)
    base, other = student.base_model, teacher.base_model
    first = other.get_submodule(f"{family.layers}.0")
    inputs = [_capture(other, batch, first) for batch in batches]
    calls = [_Call(layer, batch["attention_mask"].bool()) for layer, batch in inputs]
    pairs = list(zip(base.get_submodule(family.layers), other.get_submodule(family.layers), strict=True))
    with progress("pruning layer by layer", len(pairs)) as advance:
        student_hidden = [call.arguments.hidden for call in calls]
        teacher_hidden = list(student_hidden)
        for index, (layer, dense) in enumerate(pairs):
            names = {name for name in wanted if name.startswith(f"{family.layers}.{index}.")}
            modules = {name.removeprefix(f"{family.layers}.{index}.").removesuffix(".weight") for name in names}
            student_hidden, teacher_hidden = _prune_layer(
                layer, dense, calls, student_hidden, teacher_hidden, family.layer, modules, select
            )
            advance()
    if f"{families.POOLER}.weight" in wanted:
        firsts = [(s[:, 0], t[:, 0]) for s, t in zip(student_hidden, teacher_hidden, strict=True)]
        linear, dense = base.get_submodule(families.POOLER), other.get_submodule(families.POOLER)
        _fit_linear(linear, [(s, dense(t)) for s, t in firsts], select, families.POOLER)


def sparse_fit(weight: Tensor, moments: Tensor, products: Tensor, select: Select) -> Tensor:
    """The weight with the wanted zeros that loses least: min mean ||x W^T - y||^2 + damping ||W - weight||^2.

    Args:
        weight: (out, in) float, dense.
        moments: (in, in), mean of x^T x.
        products: (in, out), mean of x^T y.
        select: from scores (out, in) to a bool mask of what is kept.

    Returns:
        (out, in) float32; what the mask leaves out is +0.0.
    """
    identity = torch.eye(len(moments), device=moments.device)
    damping = DAMPING * moments.diagonal().mean().clamp_min(1e-12)
    moments = moments + damping * identity
    targets = products.T + damping * weight.float()
    scale = moments.diagonal().sqrt()
    moments, targets = moments / torch.outer(scale, scale), targets / scale
    kept = torch.linalg.solve(moments, targets.T).T
    kept = kept.masked_fill(~select(kept), 0.0)
    dual = torch.zeros_like(kept)
    penalty, inverse = FIRST_PENALTY, identity
    for turn in range(ROUNDS):
        if turn % SAME_PENALTY == 0:
            before = penalty
            penalty = FIRST_PENALTY * (LAST_PENALTY / FIRST_PENALTY) ** (turn / (ROUNDS - 1))
            inverse = torch.linalg.inv(moments + penalty * identity)
            dual *= before / penalty  # the dual is scaled by the penalty
        free = (targets + penalty * (kept - dual)) @ inverse
        kept = free + dual
        kept = kept.masked_fill(~select(kept), 0.0)
        dual += free - kept
    mask = select(kept)
    return (_fit_within(kept, mask, moments, targets) / scale).masked_fill(~mask, 0.0)


def _fit_within(weight: Tensor, mask: Tensor, moments: Tensor, targets: Tensor) -> Tensor:
    """Conjugate gradients for every row at once; weights outside the mask stay zero."""
    residual = (targets - weight @ moments) * mask
    direction = residual.clone()
    square = (residual**2).sum(1, keepdim=True)
    for _ in range(FITS):
        ahead = (direction @ moments) * mask
        step = square / (direction * ahead).sum(1, keepdim=True).clamp_min(1e-30)
        weight = weight + step * direction
        residual = residual - step * ahead
        following = (residual**2).sum(1, keepdim=True)
        direction = residual + following / square.clamp_min(1e-30) * direction
        square = following
    return weight


@dataclass(frozen=True)
class _Arguments:
    """What a layer is called with: its hidden states, (rows, tokens, hidden), and whatever else."""

    hidden: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class _Call:
    """The arguments of a batch's layers, which are the same for every layer but for the hidden states."""

    arguments: _Arguments
    real: Tensor  # bool (rows, tokens): not padding

    def run(self, layer: nn.Module, hidden: Tensor, watch: Iterable[str], last: str | None = None) -> "_Seen":
        """Call `layer` and keep input and output of the modules `watch`; stop after `last`, if it is given."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = []
        for name in watch:

            def keep(module: nn.Module, given: tuple[Any, ...], made: Tensor, name: str = name) -> None:
                seen[name] = (given[0][self.real], made[self.real])
                if name == last:
                    raise _EnoughError

            hooks.append(layer.get_submodule(name).register_forward_hook(keep))
        output = None
        try:
            output = layer(hidden, *self.arguments.others, **self.arguments.named)
            output = output[0] if isinstance(output, tuple) else output
        except _EnoughError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return _Seen(output, seen)


@dataclass(frozen=True)
class _Seen:
    """Output of a layer, None where it was stopped, and {module: (its input, its output)}, each (real tokens, …)."""

    output: Any
    modules: dict[str, tuple[Tensor, Tensor]]


class _EnoughError(Exception):
    """Raised inside a forward pass when all that is wanted of it has been seen."""


def _capture(model: nn.Module, batch: dict[str, Tensor], layer: nn.Module) -> tuple[_Arguments, dict[str, Tensor]]:
    """What `layer` is called with when `model` reads the batch."""
    found = []

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(_Arguments(given[0], given[1:], named))
        raise _EnoughError

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**batch)
    except _EnoughError:
        pass
    finally:
        hook.remove()
    return found[0], batch


def _prune_layer(
    layer: nn.Module,
    dense: nn.Module,
    calls: list[_Call],
    student_hidden: list[Tensor],
    teacher_hidden: list[Tensor],
    names: Layer,
    wanted: set[str],
    select: Select,
) -> tuple[list[Tensor], list[Tensor]]:
    """Prune the linears of one layer in the order in which they are computed; returns what both layers give."""
    # What stands in one group reads the same input. A LayerNorm behind a linear reads its output plus the residual.
    groups: list[tuple[list[str], str | None]] = [
        ([names.query, names.key, names.value], None),
        ([names.attention_output], names.attention_norm),
        ([names.intermediate], None),
        ([names.output], names.output_norm),
    ]
    watched = [names.query, names.key, names.value, names.attention_norm, names.intermediate, names.output_norm]
    of_teacher = [call.run(dense, hidden, watched) for call, hidden in zip(calls, teacher_hidden, strict=True)]
    for linears, norm in groups:
        linears = [name for name in linears if name in wanted]
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}
        for call, hidden, teacher in zip(calls, student_hidden, of_teacher, strict=True):
            if not linears:
                break
            watch = [*linears, norm] if norm else linears
            seen = call.run(layer, hidden, watch, last=watch[-1]).modules
            for name in linears:
                given, made = seen[name]
                goal = teacher.modules[norm][0] - (seen[norm][0] - made) if norm else teacher.modules[name][1]
                rows[name].append((given, goal))
        for name in linears:
            _fit_linear(layer.get_submodule(name), rows[name], select, name)
    student_hidden = [call.run(layer, hidden, ()).output for call, hidden in zip(calls, student_hidden, strict=True)]
    return student_hidden, [seen.output for seen in of_teacher]


def _fit_linear(linear: nn.Module, rows: list[tuple[Tensor, Tensor]], select: Select, name: str) -> None:
    """Give a linear the sparse weight and the bias that fit (input, wanted output) rows best."""
    assert isinstance(linear, nn.Linear)
    count = sum(len(x) for x, _ in rows)
    inputs = sum(x.float().sum(0) for x, _ in rows) / count
    outputs = sum(y.float().sum(0) for _, y in rows) / count
    moments = sum(x.float().T @ x.float() for x, _ in rows) / count - torch.outer(inputs, inputs)
    products = sum(x.float().T @ y.float() for x, y in rows) / count - torch.outer(inputs, outputs)
    weight = sparse_fit(linear.weight, moments, products, select)
    if not weight.isfinite().all():
        raise CheckFailed(f"{name}: its sparse fit is not finite; give more text (prune.calibration)")
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(outputs - weight @ inputs)
