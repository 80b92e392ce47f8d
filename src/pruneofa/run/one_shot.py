"""Pruning all weights of a student at once, before it trains or instead of training."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pruneofa.data.examples import IGNORED
from pruneofa.progress import progress
from pruneofa.recipe import Prune
from pruneofa.recipe.pretraining import REFITTED
from pruneofa.train.curvature import EXAMPLES, fisher_blocks, fisher_diagonal
from pruneofa.train.device import own_device
from pruneofa.train.layerwise import prune_layerwise
from pruneofa.train.micro_batches import Batch
from pruneofa.train.objective import PretrainingObjective
from pruneofa.train.prune import GradualPruner

BATCH = 32  # examples per forward pass of score hessian
# Score obs takes the weights away in so many rounds, with new scores of those that are left: two weights that stand for
# each other must not go together.
ROUNDS = 8

Examples = Callable[[int, int], Iterator[Batch]]  # (examples in all, examples per batch) -> batches of the corpus


def prune_at_once(
    objective: PretrainingObjective,
    load_dense: Callable[[], PreTrainedModel],
    settings: Prune,
    examples: Examples,
    *,
    seed: int,
    precision: str,
    kept: Path,
) -> dict[str, Any]:
    """Prune the student of `objective` in place to `settings.final`, on this process's device.

    `kept` is the folder of what is not computed again after an interruption (score hessian: the layers so far).
    Returns {"seconds", "tokens"}: the time of all attempts, and the tokens that were read.
    Raises as `prune_layerwise` and `fisher_blocks`.
    """
    begun = time.monotonic()
    device = own_device()
    student = objective.to(device).student
    tokens = 0

    def counted(count: int, size: int) -> Iterator[Batch]:
        nonlocal tokens
        for batch in examples(count, size):
            tokens += int(batch["attention_mask"].sum())
            yield batch

    if settings.score == "hessian":
        batches = counted(settings.calibration, BATCH)
        earlier = prune_layers(student, load_dense, settings, batches, final=settings.final, kept=kept)
        return {"seconds": earlier + time.monotonic() - begun, "tokens": tokens}
    pruner = GradualPruner(student, **one_shot_schedule(settings))
    curvature = None
    if settings.score != "magnitude":
        options: dict[str, Any] = {"total": settings.gradients, "seed": seed, "precision": precision}
        batches = counted(settings.gradients * EXAMPLES, EXAMPLES)
        if settings.score == "fisher":
            curvature = fisher_diagonal(objective, pruner.weights, batches, **options)
        else:
            options |= {"block": settings.block, "pattern": settings.pattern}
            curvature = fisher_blocks(objective, pruner.weights, batches, **options)
    with progress("pruning in rounds", pruner.end) as advance:
        for t in range(1, pruner.end + 1):
            pruner.step(t, curvature)
            advance()
    pruner.release()
    return {"seconds": time.monotonic() - begun, "tokens": tokens}


def prune_layers(
    student: PreTrainedModel,
    load_dense: Callable[[], PreTrainedModel],
    settings: Prune,
    batches: Iterable[Batch],
    *,
    final: float,
    kept: Path | None = None,
) -> float:
    """`prune_layerwise` to `final` as the section says, on training batches of the corpus and the student's device."""
    given = [_unmasked(batch, student.device) for batch in batches]
    dense = load_dense().to(student.device)  # pyrefly: ignore[bad-argument-type]
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("pattern", "scope", "skip")}
    return prune_layerwise(student, dense, given, final=final, **options, kept=kept)


def one_shot_schedule(settings: Prune) -> dict[str, Any]:
    """The arguments of a `GradualPruner` that is at `final` after its steps 1 to `end`."""
    names = ("final", "pattern", "scope", "skip", "dampening")
    rounds = ROUNDS if settings.score == "obs" else 1
    score = "magnitude" if settings.score == "hessian" else settings.score  # its masks are another function's
    times = {"begin": 0, "end": rounds, "stop": rounds, "interval": 1}
    return {name: getattr(settings, name) for name in names} | times | {"score": score}


def score_tokens(settings: Prune, max_length: int) -> int:
    """Positions of full-length examples that are read for scores alone, beside those of training."""
    sampled = settings.gradients * EXAMPLES
    each = {"magnitude": 0, "hessian": settings.calibration}.get(settings.score, sampled) * max_length
    if settings.at_once:
        return each
    if settings.score not in REFITTED:
        return 0
    assert settings.end is not None and settings.interval is not None
    # The selection at `begin` only counts if something is pruned then.
    return each * (-(-(settings.end - settings.begin) // settings.interval) + (settings.initial > 0))


def _unmasked(batch: Batch, device: torch.device) -> Batch:
    """A batch of masked-LM training with the original tokens restored, without labels, on `device`."""
    ids, labels = batch["input_ids"], batch["labels"]
    whole = {name: batch[name] for name in ("attention_mask", "token_type_ids") if name in batch}
    whole["input_ids"] = torch.where(labels != IGNORED, labels, ids)
    return {name: value.to(device) for name, value in whole.items()}
