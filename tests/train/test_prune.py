import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pruneofa.errors import CheckFailed, InputError
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.prune import GradualPruner
from tests.tiny import tiny_bert, tiny_distilbert, tiny_roberta
from tests.train.pruners import QUERY, SCHEDULE, bare, loss, train


def test_selections_happen_on_the_grid_at_end_and_never_after_stop():
    pruner = GradualPruner(bare(), **SCHEDULE)
    assert [t for t in range(30) if pruner.step(t)] == [2, 5, 8, 10, 11, 14]


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
        ({"score": "size"}, "score is 'size'; wanted magnitude, fisher, obs or hessian"),
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
