"""Scores of weights, and the update of the others when some are removed: pure functions of tensors.

A score is the estimated growth of the loss when a weight is removed; it is not negative. `masks.magnitude_mask` and
`masks.global_masks` take it in place of the weight: they compare magnitudes, and the mean over a block.

The loss around the current weights is taken as w^T F w / 2, with F the Fisher information of the outputs that are
distilled (`curvature`). `fisher_scores` uses the diagonal of F, `obs_scores` and `obs_update` its blocks of consecutive
weights (Kurtic et al. 2022, arXiv 2203.07259).
"""

import torch
from torch import Tensor

from pruneofa.errors import CheckFailed
from pruneofa.formats.pattern import BLOCKS, ratio_of

SCORES = ("magnitude", "fisher", "obs", "hessian")
CHUNK = 2048  # blocks of F whose inverses exist at once: 41 MB for each float64 copy of blocks of 50
LEAST = torch.finfo(torch.float32).tiny  # score of a weight whose removal costs nothing: above that of a removed one
_NOT_FINITE = "score obs: the squared gradients are not finite; lower lr, or use precision: fp32"
RETRIES = 20  # times that the damping of a block that is not positive definite is raised tenfold


def fisher_scores(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Twice the growth of the loss when a weight alone is removed: w^2 F_ii.

    Args:
        weight: (out, in) of any float dtype.
        diagonal: (out, in), mean squared gradients, at least 0.

    Returns:
        (out, in) float32.
    """
    return weight.detach().float().square() * diagonal.float()


def older_share(decay: float, before: int, now: int) -> float:
    """The share of the gradients of the first `before` steps in Adam's bias-corrected average after `now` steps."""
    return decay ** (now - before) * (1 - decay**before) / (1 - decay**now)


def obs_scores(weight: Tensor, pruned: Tensor, blocks: Tensor, dampening: float, pattern: str) -> Tensor:
    """Growth of the loss when a weight is removed and the others in its block of F are updated: w^2 / (2 (F^-1)_ii).

    For the patterns 4x1 and 1x4 it is that of removing all 4 weights, w^T ((F^-1)_QQ)^-1 w / 2, at each of them.

    Args:
        weight: (out, in) float; 0 where pruned.
        pruned: bool (out, in): weights that are removed already. They count as fixed, and their score is 0.
        blocks: (count, size, size) float32, the blocks of F in the order of `to_blocks`.
        dampening: added to the diagonal of F, relative to its mean over the layer's weights that are left.
        pattern: as in `masks.magnitude_mask`.

    Returns:
        (out, in) float32.

    Raises:
        CheckFailed: F is not finite.
    """
    size = blocks.shape[-1]
    values, left = to_blocks(weight.detach(), size, pattern), to_blocks(~pruned, size, pattern)
    found = torch.empty(values.shape, dtype=torch.float32, device=weight.device)
    damping = _damping(blocks, left, dampening)
    group = unit(pattern) if pattern in BLOCKS else 1
    for rows in _chunks(len(blocks)):
        w = values[rows].double()
        inverse = torch.cholesky_inverse(_factor(_restricted(blocks[rows], left[rows], damping), damping))
        if group == 1:
            scores = w.square() / inverse.diagonal(dim1=1, dim2=2)
        else:
            count = size // group
            own = inverse.view(-1, count, group, count, group).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            w = w.view(-1, count, group, 1)
            scores = (w * torch.linalg.solve(own, w)).sum((2, 3)).repeat_interleave(group, 1)
        found[rows] = torch.where(left[rows], (scores / 2).float().clamp_min(LEAST), 0.0)
    return from_blocks(found, weight, pattern)


def obs_update(
    weight: Tensor, pruned: Tensor, removed: Tensor, blocks: Tensor, dampening: float, pattern: str
) -> Tensor:
    """The weights after `removed` are set to 0 and the others take the values that are best for that.

    Within each block of F, with removed Q and kept K:  w_K += (F_KK)^-1 F_KQ w_Q.

    Args:
        removed: bool (out, in): weights to remove now, none of which is in `pruned`.
        weight, pruned, blocks, dampening, pattern: as in `obs_scores`.

    Returns:
        (out, in) of the weight's dtype; +0.0 where pruned or removed.
    """
    size = blocks.shape[-1]
    values = to_blocks(weight.detach(), size, pattern)
    left = to_blocks(~pruned, size, pattern)
    gone = to_blocks(removed, size, pattern)
    damping = _damping(blocks, left, dampening)
    found = torch.empty_like(values)
    for rows in _chunks(len(blocks)):
        kept, w = left[rows] & ~gone[rows], values[rows].double()
        lost = torch.where(gone[rows], w, 0.0)
        pull = torch.where(kept, (blocks[rows].double() @ lost.unsqueeze(2)).squeeze(2), 0.0)
        factor = _factor(_restricted(blocks[rows], kept, damping), damping)
        change = torch.cholesky_solve(pull.unsqueeze(2), factor).squeeze(2)
        found[rows] = torch.where(kept, w + change, 0.0).to(found.dtype)
    return from_blocks(found, weight, pattern)


def unit(pattern: str) -> int:
    """Consecutive weights, in the order of `to_blocks`, that a block of F must not divide."""
    if pattern in BLOCKS:
        rows, columns = BLOCKS[pattern]
        return rows * columns
    ratio = ratio_of(pattern)
    return ratio[1] if ratio else 1


def block_size(block: int, pattern: str) -> int:
    """The smallest size of at least `block` weights that holds whole units of the pattern."""
    return -(-block // unit(pattern)) * unit(pattern)


def to_blocks(values: Tensor, size: int, pattern: str) -> Tensor:
    """(out, in) as (count, size): row by row, for 4x1 with the 4 rows of a unit together; the end is padded with 0."""
    rows = BLOCKS[pattern][0] if pattern in BLOCKS else 1
    flat = values.reshape(values.shape[0] // rows, rows, -1).transpose(1, 2).reshape(-1)
    padding = -len(flat) % size
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    return flat.view(-1, size)


def from_blocks(blocks: Tensor, like: Tensor, pattern: str) -> Tensor:
    """The inverse of `to_blocks`, in the shape of `like`."""
    rows = BLOCKS[pattern][0] if pattern in BLOCKS else 1
    height, width = like.shape
    return blocks.reshape(-1)[: like.numel()].view(height // rows, width, rows).transpose(1, 2).reshape(height, width)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _damping(blocks: Tensor, left: Tensor, dampening: float) -> float:
    """What is added to the diagonal: relative to its mean over the weights left, or to 1 where no gradient was seen."""
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    mean = float(torch.where(left, diagonal, 0.0).sum(dtype=torch.float64) / max(int(left.count_nonzero()), 1))
    if not 0 <= mean < float("inf"):
        raise CheckFailed(_NOT_FINITE)
    return dampening * (mean or 1.0)


def _restricted(blocks: Tensor, left: Tensor, damping: float) -> Tensor:
    """F plus damping among the weights that are left, and the identity elsewhere: float64 (count, size, size)."""
    inside = (left.unsqueeze(2) & left.unsqueeze(1)).to(torch.float64)
    matrix = blocks.double() * inside
    matrix.diagonal(dim1=1, dim2=2).add_(torch.where(left, damping, 1.0))
    return matrix


def _factor(matrix: Tensor, damping: float) -> Tensor:
    """Cholesky factors; a block that rounding made indefinite gets more damping, in place."""
    for _ in range(RETRIES):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.any():
            return factor
        bad = failed > 0
        matrix[bad] += damping * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        damping *= 10
    raise CheckFailed(_NOT_FINITE)
