"""What the selections of gradual pruning with score obs or hessian take beside training.

Each one reads other examples of the corpus. Their tokens are added to a file of {step: tokens}, where a selection that
is made again after a kill is counted once.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pruneofa.errors import CheckFailed
from pruneofa.formats.files import read_json, write_json
from pruneofa.recipe import Prune
from pruneofa.run.one_shot import BATCH, unmasked
from pruneofa.train.callbacks import Blocks, Fit
from pruneofa.train.curvature import EXAMPLES, fisher_blocks
from pruneofa.train.device import processes
from pruneofa.train.layerwise import prune_layerwise
from pruneofa.train.micro_batches import Batch
from pruneofa.train.models import all_finite
from pruneofa.train.objective import PretrainingObjective

SeededExamples = Callable[[int, int, int], Iterator[Batch]]  # (seed, examples in all, examples per batch) -> batches


def obs_blocks(
    objective: PretrainingObjective, prune: Prune, examples: SeededExamples, *, seed: int, precision: str, counts: Path
) -> Blocks:
    """The curvature of the student as it is, for score obs. Raises as `fisher_blocks`."""

    def blocks(weights: Mapping[str, torch.nn.Parameter], t: int) -> dict[str, torch.Tensor]:
        tokens = 0

        def counted() -> Iterator[Batch]:
            nonlocal tokens
            for batch in examples(seed + t, prune.gradients * EXAMPLES, EXAMPLES):
                tokens += int(batch["attention_mask"].sum())
                yield batch

        found = fisher_blocks(
            objective,
            weights,
            counted(),
            total=prune.gradients,
            seed=seed + t,
            block=prune.block,
            pattern=prune.pattern,
            precision=precision,
            shared=True,
        )
        _count(counts, t, tokens)
        return found

    return blocks


def layer_fit(
    objective: PretrainingObjective,
    load_dense: Callable[[], PreTrainedModel],
    prune: Prune,
    examples: SeededExamples,
    *,
    seed: int,
    counts: Path,
) -> Fit:
    """Prune the student as it is layer by layer, for score hessian. Raises as `prune_layerwise`.

    All processes that train together do the same, and take the result of the first.
    """

    def fit(sparsity: float, t: int) -> None:
        student, state = objective.student, processes()
        training, device = student.training, student.device
        if not all_finite(student):
            raise CheckFailed(f"the weights are NaN or infinite after step {t + 1}; lower lr, or use precision: fp32")
        given = [unmasked(batch, device) for batch in examples(seed + t, prune.calibration, BATCH)]
        dense = load_dense().to(device)  # pyrefly: ignore[bad-argument-type]
        # The objective's own teacher may be in bfloat16.
        prune_layerwise(
            student, dense, given, final=sparsity, pattern=prune.pattern, scope=prune.scope, skip=prune.skip
        )
        student.train(training)
        if state.num_processes > 1:
            for parameter in student.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        _count(counts, t, sum(int(batch["attention_mask"].sum()) for batch in given))

    return fit


def _count(counts: Path, t: int, tokens: int) -> None:
    if processes().is_main_process:
        write_json(counts, (read_json(counts) if counts.exists() else {}) | {str(t): tokens})
