"""The pruner with every score: how many weights go, which ones, and what becomes of the others."""

import copy

import numpy as np
import pytest
import torch

from pruneofa.errors import CheckFailed, InputError
from pruneofa.train.curvature import second_moments
from pruneofa.train.layerwise import prune_layerwise
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.prune import GradualPruner
from pruneofa.train.schedule import cubic_sparsity
from pruneofa.train.scores import fisher_scores
from tests.train.pruners import QUERY, SCHEDULE, bare, curvature, jitter, layer_wise


@pytest.mark.parametrize("score", ["magnitude", "fisher", "obs", "hessian"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize(("pattern", "final"), [("unstructured", 0.9), ("4x1", 0.8), ("1x4", 0.8), ("2:4", 0.5)])
def test_counts_follow_the_schedule_in_every_pattern_scope_and_score(scope, pattern, final, score):
    model = bare()
    pruner = GradualPruner(model, **(SCHEDULE | {"final": final}), pattern=pattern, scope=scope, score=score)
    teacher = copy.deepcopy(model)
    sizes = {name: weight.numel() for name, weight in prunable(model).items()}
    unit = {"unstructured": 1, "4x1": 4, "1x4": 4, "2:4": 2}[pattern]
    share = 1 / final if pattern == "2:4" else 1.0
    per_unit = 4 if pattern != "unstructured" else 1
    for t in range(20):
        jitter(prunable(model), 0.01)
        before, needed = pruner.masks, None
        if pruner.due(t) and score == "hessian":
            prune_layerwise(model, **layer_wise(teacher, pruner, t), pattern=pattern, scope=scope)
            fitted = copy.deepcopy(model.state_dict())
        elif pruner.due(t) and score != "magnitude":
            needed = curvature(pruner, t)
        if not pruner.step(t, needed):
            continue
        if score == "hessian":  # the selection is that of the fit
            assert all(torch.equal(value, fitted[name]) for name, value in model.state_dict().items())
        if score == "obs":  # what is pruned stays pruned
            assert not any((mask & ~before[name]).any() for name, mask in pruner.masks.items())
        target = cubic_sparsity(t, begin=2, end=10, final=final) * share
        counts = {name: int((~mask).sum()) for name, mask in pruner.masks.items()}
        if scope == "global":
            assert sum(counts.values()) == unit * int(target * (sum(sizes.values()) // per_unit))
        else:
            assert counts == {n: unit * int(target * (size // per_unit)) for n, size in sizes.items()}
        pruner.verify()
    assert pruner.sparsity()["encoder"] == pytest.approx(final, abs=0.02)


def test_fisher_keeps_the_curvature_that_a_weight_had_when_it_was_pruned():
    pruner = GradualPruner(bare(), final=0.5, begin=0, end=1, stop=10, interval=1, initial=0.5, score="fisher")
    weight = pruner.weights[QUERY]
    first, second = curvature(pruner, 0), curvature(pruner, 1)
    dense = weight.detach().clone()
    pruner.step(0, first)
    assert torch.equal(pruner.masks[QUERY], magnitude_mask(fisher_scores(dense, first[QUERY]), 0.5))
    state = pruner.state_dict()
    kept = pruner.masks[QUERY]
    assert torch.equal(state[f"{QUERY}.diagonal"], first[QUERY].masked_fill(kept, 0.0))
    pruner.step(1, second)
    diagonal = torch.where(kept, second[QUERY], first[QUERY])
    assert torch.equal(pruner.masks[QUERY], magnitude_mask(fisher_scores(dense, diagonal), 0.5))

    resumed = GradualPruner(bare(), final=0.5, begin=0, end=1, stop=10, interval=1, score="fisher")
    with pytest.raises(InputError, match=rf"1 diagonal values of .* for {QUERY}, wanted 1024"):
        resumed.load_state_dict(state | {f"{QUERY}.diagonal": torch.zeros(1)})
    resumed.load_state_dict(state)
    with torch.no_grad():
        for name, value in resumed.weights.items():
            value.masked_fill_(~resumed.masks[name], 0.0)
    resumed.step(1, second)
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in resumed.masks.items())


def test_fisher_leaves_out_the_steps_at_which_a_weight_was_pruned():
    """Against NumPy: the estimate is a mean of the squares of those gradients alone that a weight had."""
    decay, last, steps = 0.9, -1, 45
    model, draw = bare(), np.random.default_rng(0)
    pruner = GradualPruner(
        model, final=0.6, begin=2, end=20, stop=40, interval=6, initial=0.3, score="fisher", decay=decay
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, decay))
    dense = pruner.weights[QUERY].detach().double().numpy().reshape(-1).copy()
    sizes = np.exp(draw.normal(size=dense.size))
    gradients = sizes * draw.normal(size=(steps, dense.size))
    shares = np.zeros((steps, dense.size))  # of each step's squared gradient in the estimate of each weight
    kept, returned = np.ones(dense.size, bool), 0
    for t, gradient in enumerate(gradients):
        optimizer.zero_grad()
        given = torch.from_numpy(gradient).float().view(pruner.weights[QUERY].shape)
        products = [(weight * (given if name == QUERY else 1.0)).sum() for name, weight in pruner.weights.items()]
        torch.stack(products).sum().backward()
        optimizer.step()
        if not pruner.step(t, second_moments(optimizer, pruner.weights) if pruner.due(t) else None):
            continue
        updated = shares * decay ** (t - last) * (1 - decay ** (last + 1)) / (1 - decay ** (t + 1))
        new = np.arange(last + 1, t + 1)
        updated[new] = ((1 - decay) * decay ** (t - new) / (1 - decay ** (t + 1)))[:, None]
        shares = np.where(kept, updated, shares)
        np.testing.assert_allclose(shares.sum(0), 1)
        fisher = (shares * gradients**2).sum(0)
        count = int(cubic_sparsity(t, begin=2, end=20, final=0.6, initial=0.3) * dense.size)
        before, kept = kept, np.ones(dense.size, bool)
        kept[np.argsort(dense**2 * fisher, kind="stable")[:count]] = False
        returned += int((kept & ~before).sum())
        assert (pruner.masks[QUERY].numpy().reshape(-1) == kept).all(), t
        diagonal = pruner.state_dict()[f"{QUERY}.diagonal"].numpy().reshape(-1)
        np.testing.assert_allclose(diagonal[~kept], fisher[~kept], rtol=1e-4)
        last = t
    assert returned > 10


def test_fisher_compares_what_is_not_trained_by_its_magnitude():
    pruner = GradualPruner(bare(), final=0.5, begin=0, end=1, stop=1, interval=1, initial=0.5, score="fisher")
    given = curvature(pruner, 0)
    del given[QUERY]
    dense = pruner.weights[QUERY].detach().clone()
    pruner.step(0, given)
    assert torch.equal(pruner.masks[QUERY], magnitude_mask(dense, 0.5))
    with pytest.raises(InputError, match=r"score fisher: the curvature that step\(1\) was given has no weight"):
        pruner.step(1, {})


def test_fisher_does_not_choose_among_moments_that_are_all_zero():
    options = {"final": 0.5, "begin": 0, "end": 2, "stop": 2, "interval": 1, "score": "fisher"}
    pruner = GradualPruner(bare(), **options)
    given = curvature(pruner, 0)
    zero = {name: torch.zeros_like(weight) for name, weight in pruner.weights.items()}
    pruner.step(0, zero)  # nothing is pruned yet
    with pytest.raises(CheckFailed, match=r"score fisher: the squared gradients .* are 0 at step 1, wanted some"):
        pruner.step(1, zero)
    pruner = GradualPruner(bare(), **options, initial=0.5)
    dense = {name: weight.detach().clone() for name, weight in pruner.weights.items()}
    pruner.step(0, given | {QUERY: zero[QUERY]})  # one layer that no loss reaches is compared by its magnitude
    assert torch.equal(pruner.masks[QUERY], magnitude_mask(dense[QUERY], 0.5))
    other = next(name for name in given if name != QUERY)
    assert torch.equal(pruner.masks[other], magnitude_mask(fisher_scores(dense[other], given[other]), 0.5))


def test_obs_updates_the_weights_that_stay_and_ends_with_the_ramp():
    pruner = GradualPruner(bare(), final=0.5, begin=0, end=2, stop=10, interval=1, score="obs", dampening=1e-3)
    weight = pruner.weights[QUERY]
    dense = weight.detach().clone()
    pruner.step(1, curvature(pruner, 1))
    kept = pruner.masks[QUERY]
    assert not torch.equal(weight[kept], dense[kept]) and not weight[~kept].any()
    assert [t for t in range(12) if pruner.due(t)] == [1, 2]  # after step 0 nothing would be pruned
    with pytest.raises(InputError, match=r"score obs: step\(2\) selects masks and needs the curvature"):
        pruner.step(2)
    broken = curvature(pruner, 2)
    broken[QUERY][0, 0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="score obs: the squared gradients are not finite"):
        pruner.step(2, broken)


def test_obs_keeps_no_dense_values():
    pruner = GradualPruner(bare(), **SCHEDULE, score="obs")
    pruner.step(5, curvature(pruner, 0))
    assert all(key.endswith(".pruned") for key in pruner.state_dict())
    older = {f"{name.removesuffix('.pruned')}.dense": torch.zeros(3) for name in pruner.state_dict()}
    again = GradualPruner(bare(), **SCHEDULE, score="obs")
    again.load_state_dict(pruner.state_dict() | older)  # a checkpoint of a version that kept one
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in again.masks.items())


def test_hessian_takes_the_weights_that_a_layer_wise_fit_has_pruned():
    model = bare()
    teacher = copy.deepcopy(model)
    pruner = GradualPruner(model, **SCHEDULE, score="hessian")
    assert [t for t in range(20) if pruner.due(t)] == [5, 8, 10]
    with pytest.raises(InputError, match=r"weights too many of encoder.* are not 0 at step 5; call prune_layerwise"):
        pruner.step(5)
    prune_layerwise(model, **layer_wise(teacher, pruner, 5))
    pruner.step(5)
    assert all(key.endswith(".pruned") for key in pruner.state_dict())
    first = pruner.masks[QUERY]
    assert torch.equal(first, pruner.weights[QUERY] != 0)
    with torch.no_grad():
        pruner.weights[QUERY].copy_(pruner.weights[QUERY] * 1e-3)  # what was kept matters less than what was pruned
    prune_layerwise(model, **layer_wise(teacher, pruner, 8))
    pruner.step(8)
    assert (pruner.masks[QUERY] & ~first).any()  # a weight has returned
