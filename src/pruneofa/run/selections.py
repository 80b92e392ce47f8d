"""What the selections of gradual pruning with score obs or hessian take beside training.

Each one reads other examples of the corpus, or of a stream, which begins anew each time, its first ones again. Their
tokens are added to a file of {step: tokens}, where a selection that is made again after a kill is counted once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pruneofa.errors import CheckFailed
from pruneofa.formats.files import read_json, write_json
from pruneofa.recipe import Prune
from pruneofa.run.one_shot import BATCH, prune_layers
from pruneofa.train.callbacks import Blocks, Fit
from pruneofa.train.curvature import EXAMPLES, fisher_blocks
from pruneofa.train.device import processes
from pruneofa.train.micro_batches import Batch
from pruneofa.train.models import all_finite
from pruneofa.train.objective import PretrainingObjective

SeededExamples = Callable[[int, int, int], Iterator[Batch]]  # (seed, examples in all, examples per batch) -> batches


def obs_blocks(
    objective: PretrainingObjective, prune: Prune, examples: SeededExamples, *, seed: int, precision: str, counts: Path
) -> Blocks:
    """The curvature of the student as it is, for score obs. Raises as `fisher_blocks`."""

    def blocks(weights: Mapping[str, torch.nn.Parameter], t: int) -> dict[str, torch.Tensor]:
        return fisher_blocks(
            objective,
            weights,
            _counted(examples(seed + t, prune.gradients * EXAMPLES, EXAMPLES), counts, t),
            total=prune.gradients,
            seed=seed + t,
            block=prune.block,
            pattern=prune.pattern,
            precision=precision,
            shared=True,
        )

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
        if not all_finite(student):
            raise CheckFailed(f"the weights are NaN or infinite after step {t + 1}; lower lr, or use precision: fp32")
        training = student.training
        # The dense model is loaded again: the objective's own teacher may be in bfloat16.
        batches = _counted(examples(seed + t, prune.calibration, BATCH), counts, t)
        prune_layers(student, load_dense, prune, batches, final=sparsity)
        student.train(training)
        if state.num_processes > 1:
            for parameter in student.parameters():
                torch.distributed.broadcast(parameter.data, 0)

    return fit


def _counted(batches: Iterable[Batch], counts: Path, t: int) -> Iterator[Batch]:
    """The batches of the selection after step t; after the last one their tokens are in the file."""
    tokens = 0
    for batch in batches:
        tokens += int(batch["attention_mask"].sum())
        yield batch
    if processes().is_main_process:
        write_json(counts, (read_json(counts) if counts.exists() else {}) | {str(t): tokens})
