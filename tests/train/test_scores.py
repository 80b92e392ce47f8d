"""Scores and the update of second-order pruning, against NumPy and against the loss itself."""

import numpy as np
import pytest
import torch

from pruneofa.errors import CheckFailed
from pruneofa.train.masks import magnitude_mask
from pruneofa.train.scores import block_size, fisher_scores, from_blocks, obs_scores, obs_update, to_blocks

PATTERNS = ["unstructured", "1x4", "4x1", "2:4"]


def problem(shape=(8, 12), size=8, pattern="unstructured", seed=0, dead=(), pruned=0.0):
    """A weight, its pruned positions and the blocks of a Fisher matrix; the weights `dead` by position see no input."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=shape)).float()
    mask = ~magnitude_mask(weight, pruned, pattern)
    weight = weight.masked_fill(mask, 0.0)
    gradients = torch.from_numpy(rng.normal(size=(40, *shape))).float()
    gradients.view(40, -1)[:, list(dead)] = 0
    parts = torch.stack([to_blocks(gradient, size, pattern) for gradient in gradients], 1)
    return weight, mask, parts.transpose(1, 2) @ parts / 40


def numpy_removal(weight, pruned, blocks, dampening, pattern, groups):
    """{group: growth of the loss when that group of positions in the flat order is removed}, and the best weights."""
    size = blocks.shape[-1]
    values = to_blocks(weight, size, pattern).double().numpy()
    left = to_blocks(~pruned, size, pattern).numpy()
    matrices = blocks.double().numpy()
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    damping = dampening * (diagonal[left].mean() or 1)
    found = {}
    for group in groups:
        block, inside = group[0] // size, [position % size for position in group]
        hessian = matrices[block] + damping * np.eye(size)
        kept = [i for i in range(size) if left[block, i] and i not in inside]
        change = np.zeros(size)
        change[inside] = -values[block, inside]
        change[kept] = np.linalg.solve(
            hessian[np.ix_(kept, kept)], hessian[np.ix_(kept, inside)] @ values[block, inside]
        )
        found[group] = change @ hessian @ change / 2, values[block] + change
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_hold_whole_units_and_come_back(pattern):
    values = torch.arange(12 * 8.0).view(12, 8)
    size = block_size(5, pattern)
    blocks = to_blocks(values, size, pattern)
    assert size == (5 if pattern == "unstructured" else 8) and blocks.shape == (-(-96 // size), size)
    assert torch.equal(from_blocks(blocks, values, pattern), values)
    if pattern == "4x1":
        assert blocks[0, :4].tolist() == [0, 8, 16, 24]
    assert block_size(50, "1:7") == 56 and block_size(50, "unstructured") == 50


def test_fisher_is_the_squared_weight_times_the_mean_square_of_its_gradient():
    rng = np.random.default_rng(0)
    weight, moment = rng.normal(size=(4, 8)), rng.random((4, 8))
    found = fisher_scores(torch.from_numpy(weight).bfloat16(), torch.from_numpy(moment))
    wanted = torch.from_numpy(weight).bfloat16().double().numpy() ** 2 * moment
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pruned", [0.0, 0.25])
def test_obs_scores_are_the_growth_of_the_loss(pattern, pruned):
    weight, mask, blocks = problem(pattern=pattern, pruned=pruned)
    scores = obs_scores(weight, mask, blocks, 0.1, pattern)
    flat, left = to_blocks(scores, 8, pattern).flatten(), to_blocks(~mask, 8, pattern).flatten()
    width = 4 if pattern in ("1x4", "4x1") else 1
    groups = [tuple(range(at, at + width)) for at in range(0, 96, width) if left[at]]
    for group, (growth, _) in numpy_removal(weight, mask, blocks, 0.1, pattern, groups).items():
        np.testing.assert_allclose(flat[list(group)], growth, rtol=1e-4)
    assert (flat[~left] == 0).all() and (flat[left] > 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_update_gives_the_best_weights_that_are_left(pattern):
    weight, mask, blocks = problem(pattern=pattern, pruned=0.25)
    scores = obs_scores(weight, mask, blocks, 0.1, pattern)
    removed = ~magnitude_mask(scores, 0.5, pattern) & ~mask
    assert not (magnitude_mask(scores, 0.5, pattern) & mask).any()  # what is pruned stays so
    found = obs_update(weight, mask, removed, blocks, 0.1, pattern)
    assert not found[mask | removed].any() and not torch.signbit(found[mask | removed]).any()
    gone = to_blocks(removed, 8, pattern).flatten().nonzero().flatten().tolist()
    groups = [tuple(p for p in gone if p // 8 == block) for block in range(12)]
    wanted = to_blocks(weight, 8, pattern).double().numpy()
    for group, (_, best) in numpy_removal(weight, mask, blocks, 0.1, pattern, [g for g in groups if g]).items():
        wanted[group[0] // 8] = best
    np.testing.assert_allclose(to_blocks(found, 8, pattern), wanted, atol=1e-5)


def test_two_removals_with_the_same_blocks_are_as_good_as_one():
    weight, mask, blocks = problem()
    drawn = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    first, second = drawn < 0.3, (drawn > 0.3) & (drawn < 0.6)
    # With next to no dampening, since it is relative to the weights that are left.
    once = obs_update(weight, mask, first | second, blocks, 1e-7, "unstructured")
    part = obs_update(weight, mask, first, blocks, 1e-7, "unstructured")
    torch.testing.assert_close(obs_update(part, first, second, blocks, 1e-7, "unstructured"), once, atol=1e-4, rtol=0)


def test_dead_inputs_are_removed_first_and_change_nothing():
    dead = [3, 11, 40, 41, 95]
    weight, mask, blocks = problem(dead=dead)
    scores = obs_scores(weight, mask, blocks, 1e-6, "unstructured").flatten()
    assert set(scores.argsort()[:5].tolist()) == set(dead)
    removed = torch.zeros(96, dtype=torch.bool).index_fill(0, torch.tensor(dead), True).view(8, 12)
    found = obs_update(weight, mask, removed, blocks, 0.01, "unstructured")
    torch.testing.assert_close(found[~removed], weight[~removed])


def test_a_singular_matrix_and_one_without_any_gradient_are_damped():
    weight, mask, _ = problem()
    one = torch.ones(12, 8, 1)
    singular = obs_scores(weight, mask, one @ one.transpose(1, 2), 1e-12, "unstructured")
    assert singular.isfinite().all() and (singular > 0).all()
    none = obs_scores(weight, mask, torch.zeros(12, 8, 8), 0.5, "unstructured")
    torch.testing.assert_close(none, weight.square() * 0.25)  # by magnitude
    # Rounding of the sums can leave a matrix slightly indefinite.
    indefinite = torch.eye(8).expand(12, 8, 8).clone()
    indefinite[:, 0, 1] = indefinite[:, 1, 0] = 1 + 1e-6
    assert obs_scores(weight, mask, indefinite, 1e-9, "unstructured").isfinite().all()


def test_gradients_that_are_not_finite_are_an_error():
    weight, mask, blocks = problem()
    blocks[2, 3, 3] = float("inf")
    with pytest.raises(CheckFailed, match="score obs: the squared gradients are not finite"):
        obs_scores(weight, mask, blocks, 0.1, "unstructured")


def test_the_second_order_removal_costs_less_than_that_by_magnitude():
    rng = np.random.default_rng(1)
    mix = torch.from_numpy(rng.normal(size=(8, 8))).float()  # inputs that depend on each other
    blocks = (mix @ mix.T).expand(12, 8, 8) / 8
    weight, mask, _ = problem()

    def growth(found):
        change = to_blocks(found - weight, 8, "unstructured")
        return float(((change.unsqueeze(1) @ blocks).squeeze(1) * change).sum())

    kept = magnitude_mask(obs_scores(weight, mask, blocks, 0.01, "unstructured"), 0.5)
    second = obs_update(weight, mask, ~kept, blocks, 0.01, "unstructured")
    assert int((second == 0).sum()) == 48
    assert growth(second) < 0.7 * growth(weight * magnitude_mask(weight, 0.5))
