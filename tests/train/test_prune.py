import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertModel

from pruneofa.errors import CheckFailed, InputError
from pruneofa.train.curvature import second_moments
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.prune import GradualPruner
from pruneofa.train.schedule import cubic_sparsity
from pruneofa.train.scores import fisher_scores, to_blocks
from tests.tiny import tiny_bert, tiny_distilbert, tiny_roberta

SCHEDULE = {"final": 0.9, "begin": 2, "end": 10, "stop": 16, "interval": 3}
QUERY = "encoder.layer.0.attention.self.query.weight"


def bare(seed=0, **config):
    return tiny_bert(BertModel, seed=seed, **config)


def loss(model, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, model.config.vocab_size, (4, 8), generator=generator)
    output = model(input_ids=ids)
    return output.last_hidden_state[..., :3].square().mean() + output.pooler_output.square().mean()


def train(model, pruner, steps, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    selected = []
    for t in steps:
        optimizer.zero_grad()
        loss(model, t).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if pruner.step(t):
            selected.append(t)
    return optimizer, selected


def jitter(weights, scale=0.05):
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape) * scale)


def test_selections_happen_on_the_grid_at_end_and_never_after_stop():
    pruner = GradualPruner(bare(), **SCHEDULE)
    assert [t for t in range(30) if pruner.step(t)] == [2, 5, 8, 10, 11, 14]


def curvature(pruner, seed):
    """Random curvature of the weights that are left, for the pruner's score."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in pruner.weights.items():
        gradients = torch.randn(20, *weight.shape, generator=generator) * pruner.masks[name]
        if pruner.score == "obs":
            parts = torch.stack([to_blocks(gradient, 8, pruner.pattern) for gradient in gradients], 1)
            found[name] = parts.transpose(1, 2) @ parts
        else:
            found[name] = gradients.square().mean(0)
    return found


@pytest.mark.parametrize("score", ["magnitude", "fisher", "obs"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize(("pattern", "final"), [("unstructured", 0.9), ("4x1", 0.8), ("1x4", 0.8), ("2:4", 0.5)])
def test_counts_follow_the_schedule_in_every_pattern_scope_and_score(scope, pattern, final, score):
    model = bare()
    pruner = GradualPruner(model, **(SCHEDULE | {"final": final}), pattern=pattern, scope=scope, score=score)
    sizes = {name: weight.numel() for name, weight in prunable(model).items()}
    unit = {"unstructured": 1, "4x1": 4, "1x4": 4, "2:4": 2}[pattern]
    share = 1 / final if pattern == "2:4" else 1.0
    per_unit = 4 if pattern != "unstructured" else 1
    for t in range(20):
        jitter(prunable(model), 0.01)
        before = pruner.masks
        if not pruner.step(t, curvature(pruner, t) if pruner.due(t) and score != "magnitude" else None):
            continue
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


def test_the_kept_are_the_largest_of_trained_and_frozen_values():
    model = bare()
    pruner = GradualPruner(model, final=0.5, begin=0, end=1, stop=10, interval=1, initial=0.5)
    weight = prunable(model)[QUERY]
    pruner.step(0)
    dense = weight.detach().clone()
    frozen = pruner.state_dict()[f"{QUERY}.dense"]
    assert (frozen.abs() > 0).all() and not (weight[~pruner.masks[QUERY]]).any()
    with torch.no_grad():
        weight.mul_(1e-4)  # every survivor becomes tiny: the pruned ones must come back with their old values
    before = weight.detach().clone()
    full = before.clone()
    full[~pruner.masks[QUERY]] = frozen
    pruner.step(1)
    assert torch.equal(pruner.masks[QUERY], magnitude_mask(full, 0.5))
    assert torch.equal(weight, full.masked_fill(~magnitude_mask(full, 0.5), 0.0))
    assert not torch.equal(weight, dense)


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
    assert [t for t in range(12) if pruner.due(t)] == [0, 1, 2]
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


def test_a_pruned_weight_is_positive_zero_has_no_gradient_and_does_not_decay():
    model = bare()
    pruner = GradualPruner(model, **SCHEDULE, initial=0.5)
    train(model, pruner, range(3))
    first = pruner.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    train(model, pruner, range(3, 5), optimizer)  # no selection in these steps
    for name, value in pruner.state_dict().items():
        assert torch.equal(value, first[name]), name
    for name, weight in prunable(model).items():
        pruned = ~pruner.masks[name]
        assert pruned.any()
        assert not weight[pruned].any() and not weight[pruned].signbit().any()
        assert not weight.grad[pruned].any()


def test_negative_weights_become_positive_zero():
    model = bare()
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.copy_(-weight.abs())
    GradualPruner(model, final=0.9, begin=0, end=1, stop=1, interval=1, initial=0.9).step(0)
    for weight in prunable(model).values():
        assert (weight == 0).any() and not weight[weight == 0].signbit().any()


def test_at_initial_sparsity_zero_nothing_changes():
    model = bare()
    before = copy.deepcopy(model.state_dict())
    pruner = GradualPruner(model, final=0.9, begin=0, end=10, stop=10, interval=1)
    assert pruner.step(0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert pruner.sparsity()["encoder"] == 0


def test_an_already_sparse_model_goes_on_from_where_it_is():
    model = bare()
    GradualPruner(model, final=0.5, begin=0, end=1, stop=1, interval=1, initial=0.5).step(0)
    zeros = {name: weight == 0 for name, weight in prunable(model).items()}
    pruner = GradualPruner(model, final=0.9, begin=0, end=4, stop=4, interval=1, initial=0.5)
    for t in range(5):
        pruner.step(t)
    for name, weight in prunable(model).items():
        assert (weight == 0)[zeros[name]].all()
    assert pruner.sparsity()["encoder"] == pytest.approx(0.9, abs=1e-3)


@settings(max_examples=8)
@given(
    st.sampled_from(["unstructured", "4x1", "1x4", "2:4"]),
    st.sampled_from(["uniform", "global"]),
    st.integers(1, 17),
)
def test_resume_continues_bit_identically(tmp_path_factory, pattern, scope, cut):
    file = tmp_path_factory.mktemp("state") / "pruner.safetensors"
    arguments = SCHEDULE | {"final": 0.5, "pattern": pattern, "scope": scope}
    straight = bare()
    train(straight, GradualPruner(straight, **arguments), range(18))

    model = bare()
    pruner = GradualPruner(model, **arguments)
    optimizer, _ = train(model, pruner, range(cut))
    save_file(pruner.state_dict(), file)
    resumed = bare(seed=1)
    again = GradualPruner(resumed, **arguments)
    again.load_state_dict(load_file(file))
    resumed.load_state_dict(model.state_dict())
    new_optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.01, weight_decay=0.1)
    new_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in pruner.state_dict().items():
        assert torch.equal(again.state_dict()[key].view(torch.uint8), value.view(torch.uint8)), key
    train(resumed, again, range(cut, 18), new_optimizer)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_state_is_small_and_canonical():
    pruner = GradualPruner(tiny_bert(), final=0.9, begin=0, end=1, stop=1, interval=1, initial=0.9)
    pruner.step(0)
    state = pruner.state_dict()
    assert state[f"{QUERY}.pruned"].shape == (128,) and state[f"{QUERY}.pruned"].dtype == torch.uint8
    assert state[f"{QUERY}.dense"].shape == (int(0.9 * 1024),)
    assert not any(key.startswith("bert.") for key in state)


def test_a_damaged_state_changes_nothing():
    pruner = GradualPruner(bare(), **SCHEDULE)
    pruner.step(5)
    state = pruner.state_dict()
    other = GradualPruner(bare(), **SCHEDULE)
    before = other.masks
    broken = dict(list(state.items())[:-1])
    with pytest.raises(InputError, match=r"nothing for pooler\.dense\.weight"):
        other.load_state_dict(broken)
    with pytest.raises(InputError, match=rf"1 dense values of .* for {QUERY}"):
        other.load_state_dict(state | {f"{QUERY}.dense": torch.zeros(1)})
    assert all(torch.equal(before[name], mask) for name, mask in other.masks.items())


def test_sparsity_counts_skipped_layers_as_dense_and_the_pooler_apart():
    model = tiny_bert()
    pruner = GradualPruner(model, final=0.5, begin=0, end=1, stop=1, interval=1, initial=0.5, skip=[r"layer\.0\."])
    pruner.step(0)
    sparsity = pruner.sparsity()
    assert sparsity["encoder"] == 0.25
    assert sparsity["pooler"] == 0.5
    assert len(sparsity["layers"]) == 7
    assert not any("layer.0." in name for name in pruner.masks)
    assert GradualPruner(tiny_roberta(), **SCHEDULE).sparsity()["pooler"] is None
    assert GradualPruner(tiny_distilbert(), **SCHEDULE).sparsity()["encoder"] == 0.0


def test_verify_names_the_layer():
    model = bare()
    pruner = GradualPruner(model, **SCHEDULE)
    pruner.step(8)
    with torch.no_grad():
        prunable(model)[QUERY].add_(1)
    with pytest.raises(CheckFailed, match=rf"{QUERY}: \d+ pruned weights are not zero"):
        pruner.verify()


def test_release_lets_go_of_the_model():
    model = bare()
    pruner = GradualPruner(model, **SCHEDULE)
    pruner.step(10)
    pruner.release()
    loss(model, 0).backward()
    assert prunable(model)[QUERY].grad[~pruner.masks[QUERY]].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final": 1.0}, "final is 1.0 but must be at least 0 and below 1"),
        ({"final": 90}, "final is 90 but must be"),
        ({"final": -0.1}, "final is -0.1 but must be"),
        ({"final": float("nan")}, "final is nan but must be"),
        ({"initial": 0.95}, "initial is 0.95"),
        ({"begin": 10}, "begin is 10"),
        ({"begin": -1}, "begin is -1 but must be at least 0"),
        ({"stop": 9}, r"stop is 9 but must be at least end \(10\)"),
        ({"interval": 0}, "interval is 0"),
        ({"pattern": "2:4"}, "pattern 2:4 gives 0.5"),
        ({"pattern": "4x4"}, "pattern is '4x4'; wanted"),
        ({"scope": "layer"}, "scope is 'layer'; wanted uniform or global"),
        ({"skip": ["."]}, "skip: . leave no layer to prune"),
        ({"score": "hessian"}, "score is 'hessian'; wanted magnitude, fisher or obs"),
        ({"score": "obs", "dampening": 0.0}, "dampening is 0.0 but must be above 0"),
        ({"score": "fisher", "decay": 1.0}, "decay is 1.0 but must be at least 0 and below 1"),
    ],
)
def test_bad_settings_are_refused_before_training(change, message):
    with pytest.raises(InputError, match=message):
        GradualPruner(bare(), **(SCHEDULE | change))


def test_shapes_that_do_not_divide_are_refused_before_training():
    model = bare(intermediate_size=62)
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.intermediate\.dense\.weight: shape 62x32 .* 4x1"):
        GradualPruner(model, **SCHEDULE, pattern="4x1")
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.output\.dense\.weight: shape 32x62 .* 1x4"):
        GradualPruner(model, **SCHEDULE, pattern="1x4")
    GradualPruner(model, **SCHEDULE, pattern="1x4", skip=[r"\d\.output\.dense"])
