"""Layer-wise pruning with second-order information (score: hessian), at once or as a selection of gradual pruning.

The linear layers of the student are pruned in the order of the forward pass. Each one solves a least-squares problem
under a sparsity constraint: with the wanted share of non-zero weights, reproduce the output of the dense teacher's
layer on the inputs that the student's layer receives from the layers pruned before it.

    minimize over W:  mean ||x W^T - y||^2 + damping ||W - W_before||^2,  subject to the sparsity of W

x is the student's input and y the teacher's output; where a residual connection follows, y also corrects the error of
the residual. W_before is the student's weight as it is, dense or trained after an earlier selection. ADMM selects the
mask and conjugate gradients solve for the remaining weights, as in ALPS (Meng et al. 2024, arXiv 2406.07831). Only
forward passes are needed: minutes on a CPU for a small encoder.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruneofa import families
from pruneofa.errors import CheckFailed
from pruneofa.families.family import Layer
from pruneofa.formats.cache import cached_folder
from pruneofa.formats.files import read_json, write_json
from pruneofa.train.device import refuse_more_than_free, shared_progress
from pruneofa.train.layer_shares import layer_shares, mask_of_share
from pruneofa.train.masks import check_shape, magnitude_mask, prunable, unwrapped_name

DAMPING = 0.01  # added to the diagonal of the moments, relative to its mean
ROUNDS = 30  # ADMM iterations
FIRST_PENALTY, LAST_PENALTY = 0.03, 30.0  # ADMM penalty, rising geometrically; the inputs are scaled to variance 1
SAME_PENALTY = 5  # ADMM iterations that use the same penalty and hence the same matrix inverse
FITS = 20  # conjugate-gradient iterations
LAYER, CLOCK = "layer.safetensors", "clock.json"

Select = Callable[[Tensor], Tensor]


def memory_needed(tokens: int, hidden: int, inner: int, parameters: int) -> int:
    """Bytes that `prune_layerwise` takes beside the student, with the dense model, which is loaded for it.

    Args:
        tokens: of text, in all batches.
        hidden: width of the hidden states.
        inner: width of the intermediate layer, whose moments are the largest.
        parameters: numbers of the dense model, float32.
    """
    # Per token: the embeddings of both, the states of student and teacher before the layer and of the teacher after it;
    # the outputs in the teacher's layer that are the goals; input and goal of the linears that are fitted. Then
    # matrices of the moments: as summed, damped, scaled, the identity, and an inverse with its copy.
    states, goals, fitted = 5 * hidden, 5 * hidden + inner, hidden + inner
    return 4 * (tokens * (states + goals + fitted) + 6 * inner * inner + parameters)


def check_memory(weights: Mapping[str, Tensor], tokens: int, parameters: int) -> None:
    """Raises InputError when the memory that is free cannot hold what `prune_layerwise` needs for these weights.

    `parameters`: numbers of the dense model.
    """
    sizes = [size for weight in weights.values() for size in weight.shape]
    refuse_more_than_free(
        memory_needed(tokens, min(sizes), max(sizes), parameters),
        f"prune.score hessian: {tokens:,} tokens of calibration",
        "lower prune.calibration",
    )


@torch.no_grad()
def prune_layerwise(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    final: float,
    pattern: str = "unstructured",
    scope: str = "uniform",
    skip: Iterable[str] = (),
    kept: Path | None = None,
) -> float:
    """Prune `student` in place, layer by layer; its weights and biases are fitted to the outputs of `teacher`.

    The inputs and outputs of a layer are held for all batches: see `memory_needed`.

    Args:
        student: a copy of `teacher`, or one that was trained and perhaps pruned since, of which every weight may
            return; both are put into evaluation mode.
        teacher: the dense model.
        batches: {"input_ids", "attention_mask", …}, int64 (rows, tokens), on the models' device; at least some
            thousand tokens of text in all.
        final: sparsity of the pruned weights, 0 to 1.
        pattern: as in `masks.magnitude_mask`.
        scope: uniform, every weight to `final`; or global, each to what `layer_shares` finds, `final` in all.
        skip: regular expressions matching the names of weights that stay dense.
        kept: folder where every layer is kept as soon as it is pruned; those that are there already, from the same
            models, batches and settings, are read and not pruned again.

    Returns:
        The seconds that earlier attempts took for the layers that were read.

    Raises:
        InputError: the model has no encoder, or the shape of a weight does not divide into the pattern's blocks.
        CheckFailed: the inputs of a layer or its fitted weight are not finite.
    """
    weights = prunable(student, skip)
    for name, weight in weights.items():
        check_shape(name, tuple(weight.shape), pattern)
    batches = list(batches)
    student.eval()
    teacher.eval()
    selects = dict.fromkeys(map(unwrapped_name, weights), partial(magnitude_mask, sparsity=final, pattern=pattern))
    if scope == "global":
        shares = layer_shares(teacher, batches, final, pattern, skip)
        selects = {name: partial(mask_of_share, share=share, pattern=pattern) for name, share in shares.items()}
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    family = families.of(student.config.model_type)
    base, other = student.base_model, teacher.base_model
    calls, dense_calls = (
        [_Call(_capture(model, batch, f"{family.layers}.0"), batch["attention_mask"].bool()) for batch in batches]
        for model in (base, other)
    )
    layers, dense_layers = (cast(nn.ModuleList, model.get_submodule(family.layers)) for model in (base, other))
    pairs = list(zip(layers, dense_layers, strict=True))
    earlier = 0.0
    with shared_progress("pruning layer by layer", len(pairs)) as advance:
        student_hidden = [call.arguments.hidden for call in calls]
        teacher_hidden = [call.arguments.hidden for call in dense_calls]
        for index, (layer, dense) in enumerate(pairs):
            path = f"{family.layers}.{index}."
            modules = {
                name.removeprefix(path).removesuffix(".weight"): select
                for name, select in selects.items()
                if name.startswith(path)
            }
            student_side, teacher_side = (calls, student_hidden), (dense_calls, teacher_hidden)
            prune = partial(_prune_layer, layer, dense, student_side, teacher_side, family.layer, modules)
            if kept is None:
                prune(None)
            elif cached_folder(kept / f"layer-{index}", prune):
                folder = kept / f"layer-{index}"
                layer.load_state_dict(load_file(folder / LAYER))
                earlier += read_json(folder / CLOCK)["seconds"]
            student_hidden = [call.run(layer, x, ()).output for call, x in zip(calls, student_hidden, strict=True)]
            teacher_hidden = [
                call.run(dense, x, ()).output for call, x in zip(dense_calls, teacher_hidden, strict=True)
            ]
            advance()
    if families.POOLER_WEIGHT in selects:
        firsts = [(s[:, 0], t[:, 0]) for s, t in zip(student_hidden, teacher_hidden, strict=True)]
        linear, dense = base.get_submodule(families.POOLER), other.get_submodule(families.POOLER)
        pairs = [(s, dense(t)) for s, t in firsts]
        _fit_linear(linear, pairs, selects[families.POOLER_WEIGHT], families.POOLER)
    return earlier


def sparse_fit(weight: Tensor, moments: Tensor, products: Tensor, select: Select) -> Tensor:
    """The sparse W that minimizes mean ||x W^T - y||^2 + damping ||W - weight||^2, with the mask found by ADMM.

    Args:
        weight: (out, in) float, as it is; zeros may become other values.
        moments: (in, in) float32, mean of x^T x.
        products: (in, out) float32, mean of x^T y.
        select: maps scores (out, in) to a bool mask (out, in), True = kept.

    Returns:
        (out, in) float32; pruned weights are +0.0.
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
    """Minimize over the weights inside the mask by conjugate gradients, all rows at once; the others stay zero."""
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
    """Arguments of a layer's forward: hidden states (rows, tokens, hidden), other positional and keyword arguments."""

    hidden: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class _Call:
    """The arguments of the layers for one batch: every layer gets the same ones except the hidden states."""

    arguments: _Arguments
    real: Tensor  # bool (rows, tokens), False at padding

    def run(self, layer: nn.Module, hidden: Tensor, watch: Iterable[str], last: str | None = None) -> "_Seen":
        """Call `layer` and record input and output of the submodules `watch`; stop after `last` if it is given."""
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
    """Output of a layer, or None if it was stopped early, and {module: (input, output)}, each (real tokens, …)."""

    output: Any
    modules: dict[str, tuple[Tensor, Tensor]]


class _EnoughError(Exception):
    """Raised inside a forward pass to stop it once everything needed has been recorded."""


def _capture(model: nn.Module, batch: dict[str, Tensor], layer: str) -> _Arguments:
    """The arguments that the submodule `layer` receives in a forward pass of `model` on the batch."""
    found = []

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(_Arguments(given[0], given[1:], named))
        raise _EnoughError

    hook = model.get_submodule(layer).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**batch)
    except _EnoughError:
        pass
    finally:
        hook.remove()
    return found[0]


def _prune_layer(
    layer: nn.Module,
    dense: nn.Module,
    student_side: tuple[list[_Call], list[Tensor]],
    teacher_side: tuple[list[_Call], list[Tensor]],
    names: Layer,
    selects: Mapping[str, Select],
    target: Path | None,
) -> None:
    """Prune the linears of one layer in the order of the forward pass, and save the layer in the folder `target`.

    The sides are the calls of the layer, and the hidden states that it gets; `selects` are of the linears to prune.
    """
    begun = time.monotonic()
    # The linears of a group read the same input. The LayerNorm after a linear reads its output plus the residual.
    groups: list[tuple[list[str], str | None]] = [
        ([names.query, names.key, names.value], None),
        ([names.attention_output], names.attention_norm),
        ([names.intermediate], None),
        ([names.output], names.output_norm),
    ]
    norms = (names.attention_norm, names.output_norm)
    watched = [names.query, names.key, names.value, names.intermediate, *norms]
    goals: list[dict[str, Tensor]] = []  # per batch: outputs of the teacher's linears, inputs of its norms
    for call, hidden in zip(*teacher_side, strict=True):
        seen = call.run(dense, hidden, watched, last=names.output_norm).modules
        goals.append({name: given if name in norms else made for name, (given, made) in seen.items()})
    for linears, norm in groups:
        linears = [name for name in linears if name in selects]
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}
        for call, hidden, goal in zip(*student_side, goals, strict=True):
            if not linears:
                break
            watch = [*linears, norm] if norm else linears
            modules = call.run(layer, hidden, watch, last=watch[-1]).modules
            for name in linears:
                given, made = modules[name]
                rows[name].append((given, goal[norm] - (modules[norm][0] - made) if norm else goal[name]))
        for name in linears:
            _fit_linear(layer.get_submodule(name), rows[name], selects[name], name)
    if target is not None:
        save_file(layer.state_dict(), target / LAYER)
        write_json(target / CLOCK, {"seconds": time.monotonic() - begun})


def _fit_linear(linear: nn.Module, rows: list[tuple[Tensor, Tensor]], select: Select, name: str) -> None:
    """Set the sparse weight and the bias of a linear by least squares on pairs (input, target output)."""
    assert isinstance(linear, nn.Linear)
    count = sum(len(x) for x, _ in rows)
    inputs = torch.stack([x.float().sum(0) for x, _ in rows]).sum(0) / count
    outputs = torch.stack([y.float().sum(0) for _, y in rows]).sum(0) / count
    # The means are taken off first: a difference of large products would lose the variance of nearly constant inputs.
    moments = torch.zeros(len(inputs), len(inputs), device=inputs.device)
    products = torch.zeros(len(inputs), len(outputs), device=inputs.device)
    for x, y in rows:
        x, y = x.float() - inputs, y.float() - outputs
        moments += x.T @ x
        products += x.T @ y
    if not (moments.isfinite().all() and products.isfinite().all()):
        raise CheckFailed(
            f"{name}: its inputs, or the outputs of the dense model, are NaN, infinite or too large for float32; prune "
            "a model whose hidden states are finite"
        )
    weight = sparse_fit(linear.weight, moments / count, products / count, select)
    if not weight.isfinite().all():
        raise CheckFailed(f"{name}: its sparse fit is not finite; give more text (prune.calibration)")
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(outputs - weight @ inputs)
