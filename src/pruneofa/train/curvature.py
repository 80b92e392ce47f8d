"""The Fisher information of a student's outputs: its diagonal from an optimizer, its diagonal or blocks from gradients.

Gradients are those of outputs sampled from the student itself: Gaussian noise around the hidden states that are
distilled, words drawn from its own predictions. Their mean square is the curvature of the distillation losses where
student and teacher agree, and unlike the gradients of these losses they do not vanish there.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruneofa.data.examples import IGNORED
from pruneofa.errors import CheckFailed, InputError
from pruneofa.train.device import processes, refuse_more_than_free, shared_progress
from pruneofa.train.heads import next_sentence_logits, vocabulary_head
from pruneofa.train.objective import PretrainingObjective, model_inputs
from pruneofa.train.scores import CHUNK, block_size, to_blocks

EXAMPLES = 4  # per gradient: the noise of the examples is independent, so the mean square is the sum of theirs
HELD = 16  # gradients that are held until they are added to the blocks by one product

Weights = Mapping[str, nn.Parameter]


def second_moments(optimizer: Any, weights: Weights) -> dict[str, Tensor]:
    """The bias-corrected mean squared gradients that Adam keeps, by name; float (out, in).

    A weight that is not trained is left out.

    Raises:
        InputError: the optimizer keeps none for a weight that is trained, or no weight is trained.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    decay = _decays(optimizer)
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        state = optimizer.state.get(weight, {})
        if "exp_avg_sq" in state:
            correction = 1 - decay[id(weight)] ** float(state["step"])
            found[name] = state["exp_avg_sq"].detach() / max(correction, 1e-12)
        elif weight.requires_grad:
            raise InputError(
                f"score fisher: {type(optimizer).__name__} keeps no second moment of {name}, wanted Adam or AdamW "
                "after a step; choose such an optimizer, or score magnitude"
            )
    if not found:
        raise InputError("score fisher: no weight that is pruned is trained; choose score magnitude")
    return found


def moment_decay(optimizer: Any, weights: Weights) -> float:
    """The decay of the averages of `second_moments`, Adam's second beta.

    Raises:
        InputError: it is not the same for all weights.
    """
    decay = _decays(getattr(optimizer, "optimizer", optimizer))
    found = sorted({decay[id(weight)] for weight in weights.values() if id(weight) in decay})
    if len(found) > 1:
        raise InputError(
            f"score fisher: Adam's second beta is {found[0]:g} for some weights and {found[-1]:g} for "
            "others; wanted the same for all that are pruned"
        )
    return found[0] if found else 0.0


def _decays(optimizer: Any) -> dict[int, float]:
    """Adam's second beta by the id of the parameter; 0 for other optimizers."""
    return {id(p): group.get("betas", (0, 0))[1] for group in optimizer.param_groups for p in group["params"]}


def fisher_diagonal(
    objective: PretrainingObjective,
    weights: Weights,
    batches: Iterable[dict[str, Tensor]],
    *,
    total: int,
    seed: int,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Mean squared gradients of `total` batches, float32 (out, in) by name, scaled to mean 1 over all weights.

    Raises:
        CheckFailed: they are not finite, or all are 0.
    """
    found = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for gradients in _gradients(objective, weights, batches, total=total, seed=seed, precision=precision):
        for name, gradient in gradients.items():
            found[name].addcmul_(gradient, gradient)
    return _scaled(found, found, weights)


def fisher_blocks(
    objective: PretrainingObjective,
    weights: Weights,
    batches: Iterable[dict[str, Tensor]],
    *,
    total: int,
    seed: int,
    block: int,
    pattern: str,
    precision: str = "fp32",
    shared: bool = False,
) -> dict[str, Tensor]:
    """The blocks of the Fisher information from the gradients of `total` batches, by name.

    `shared`: all processes that train together call this with the same batches; each one takes its share of them, and
    all get the same blocks.

    Returns:
        float32 (count, size, size) for `scores.obs_scores`, scaled to a mean of the diagonal of 1 over all weights.

    Raises:
        InputError: there is not enough memory.
        CheckFailed: the gradients are not finite, or all are 0.
    """
    check_memory(weights, block, pattern)
    size = block_size(block, pattern)
    shapes = {name: to_blocks(weight.detach(), size, pattern).shape for name, weight in weights.items()}
    device = next(iter(weights.values())).device
    found = {name: torch.zeros(*shape, size, device=device) for name, shape in shapes.items()}
    held = {name: torch.zeros(shape[0], HELD, size, device=device) for name, shape in shapes.items()}
    count = 0
    state = processes()
    if shared:
        batches = itertools.islice(batches, state.process_index, None, state.num_processes)
        total, seed = -(-total // state.num_processes), seed + state.process_index
    for gradients in _gradients(objective, weights, batches, total=total, seed=seed, precision=precision):
        for name, gradient in gradients.items():
            held[name][:, count] = to_blocks(gradient, size, pattern)
        count += 1
        if count == HELD:
            _add(found, held, count)
            count = 0
    _add(found, held, count)
    if shared and state.num_processes > 1:
        for blocks in found.values():
            torch.distributed.all_reduce(blocks)
    return _scaled(found, {name: blocks.diagonal(dim1=1, dim2=2) for name, blocks in found.items()}, weights)


def memory_needed(weights: int, block: int, pattern: str) -> int:
    """Bytes that `fisher_blocks` and the scores take beside the model, for this number of weights."""
    size = block_size(block, pattern)
    # The blocks, the gradients that are held, one gradient with its copy in order of the blocks, and the scores; then
    # the float64 matrices of a chunk: F, the restriction, the factor and the inverse.
    return 4 * weights * (size + HELD + 3) + 8 * 4 * CHUNK * size * size


def check_memory(weights: Mapping[str, Tensor], block: int, pattern: str) -> None:
    """Raises InputError when the memory that is free cannot hold the blocks of these weights."""
    count = sum(weight.numel() for weight in weights.values())
    refuse_more_than_free(
        memory_needed(count, block, pattern),
        f"prune.score obs: {count / 1e6:.1f} million weights in blocks of {block_size(block, pattern)}",
        "lower prune.block, or set prune.score to fisher or hessian",
    )


def sampled_loss(objective: PretrainingObjective, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """A scalar whose gradient g is a sample with mean g g^T = the curvature of the distillation losses.

    Hidden states h with weight c in the loss contribute sqrt(2 c) <noise, h>, the words at labelled positions and the
    next sentences the cross-entropy of what is drawn from the student's own predictions (at temperature 1). Padding is
    left out.

    Args:
        batch: as for `PretrainingObjective.forward`.
        generator: on the device of the batch.
    """
    inputs, real = model_inputs(objective.student, batch), batch["attention_mask"].bool()
    states = objective.student.base_model(**inputs, output_hidden_states=True, return_dict=True)
    pooled = getattr(states, "pooler_output", None)
    terms = []
    if objective.hidden:
        layers = [(state, real) for state in states.hidden_states[1:]]
        layers += [] if pooled is None else [(pooled, None)]
        # The second derivative of a square is twice its weight, and the loss is the mean over layers and positions.
        positions = max(int(real.count_nonzero()), 1)
        scale = (2 * objective.hidden / (len(states.hidden_states) * positions)) ** 0.5
        terms = [scale * _noisy(state, rows, objective, generator) for state, rows in layers]
    if objective.hard or objective.kd:
        rows = (batch["labels"] != IGNORED) & real
        transform, decoder = vocabulary_head(objective.student)
        weight = objective.hard + objective.kd
        terms.append(_drawn(decoder(transform(states.last_hidden_state[rows])), weight, generator))
        if objective.nsp:
            terms.append(_drawn(next_sentence_logits(objective.student, states.pooler_output), weight, generator))
    return torch.stack(terms).sum()


def _drawn(logits: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    """sqrt(weight / rows) times the cross-entropy of (rows, classes) logits with classes drawn from them."""
    logits = logits.float()
    classes = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    return (weight / max(len(classes), 1)) ** 0.5 * F.cross_entropy(logits, classes, reduction="sum")


def _noisy(state: Tensor, rows: Tensor | None, objective: PretrainingObjective, generator: torch.Generator) -> Tensor:
    """<noise, state> / sqrt(width), as in the squared error of a position; relative to its size if that is."""
    noise = torch.randn(state.shape, generator=generator, device=state.device)
    if objective.hidden_norm:
        noise = noise / state.detach().float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    if rows is not None:
        noise = noise.masked_fill(~rows.unsqueeze(-1), 0.0)
    return (noise * state.float()).sum() / state.shape[-1] ** 0.5


def _gradients(
    objective: PretrainingObjective,
    weights: Weights,
    batches: Iterable[dict[str, Tensor]],
    *,
    total: int,
    seed: int,
    precision: str,
) -> Iterator[dict[str, Tensor]]:
    """The gradient of each batch's `sampled_loss`, float32 by name, dropout off; weights without one are left out."""
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not trained:
        return
    training, device = objective.student.training, next(iter(weights.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    objective.student.eval()
    try:
        with shared_progress("gradients for the scores", total) as advance:
            for batch in batches:
                here = {name: value.to(device) for name, value in batch.items()}
                with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = sampled_loss(objective, here, generator)
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                yield {n: g.float() for n, g in zip(trained, found, strict=True) if g is not None}
                advance()
    finally:
        objective.student.train(training)


def _add(blocks: dict[str, Tensor], held: dict[str, Tensor], count: int) -> None:
    """Add the products of the gradients that are held to the blocks."""
    for name, gradients in held.items():
        part = gradients[:, :count]
        blocks[name].baddbmm_(part.transpose(1, 2), part)
        gradients.zero_()


def _scaled(found: dict[str, Tensor], diagonals: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """Divide by the mean of the diagonal over the weights that a loss reaches; the diagonal of the others is 1.

    A layer that no loss reaches, as a pooler without its head, is so compared by its magnitude.
    """
    total, reached = 0.0, 0
    unreached: list[Tensor] = []
    for name, diagonal in diagonals.items():
        layer = float(diagonal.sum(dtype=torch.float64))
        if not 0 <= layer < float("inf"):
            raise CheckFailed(f"prune.score: the squared gradients of {name} are not finite; set precision: fp32")
        total += layer
        if layer:
            reached += weights[name].numel()
        else:
            unreached.append(diagonal)
    if total == 0:
        raise CheckFailed("prune.score: the gradients of all weights are 0; give more text, or set score: magnitude")
    mean = total / reached
    for diagonal in unreached:
        diagonal.fill_(mean)  # in place: for blocks it is a view of them
    return {name: values.div_(mean) for name, values in found.items()}
