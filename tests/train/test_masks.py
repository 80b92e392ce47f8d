import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForQuestionAnswering, BertModel, DistilBertForQuestionAnswering, RobertaModel

from pruneofa.errors import InputError
from pruneofa.families import is_encoder_weight
from pruneofa.train.masks import check_shape, final_of, global_masks, magnitude_mask, prunable, unit_scores
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta

# Few distinct values, so that ties, zeros and both signs are the rule and not the exception.
VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0, 3.0, 1e-30, -1e30])
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9, 0.999]), st.floats(0, 0.999))


@st.composite
def weights(draw, up_to=(12, 12), multiple=(1, 1)):
    shape = [draw(st.integers(1, limit)) * size for limit, size in zip(up_to, multiple, strict=True)]
    values = draw(st.lists(VALUES, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return torch.tensor(values).view(shape)


def by_sorting(scores, k):
    """The definition: the first k in a stable sort are pruned."""
    kept = np.ones(len(scores), dtype=bool)
    kept[np.argsort(scores, kind="stable")[:k]] = False
    return kept


@given(weights(), SPARSITIES)
def test_unstructured_is_a_stable_sort(weight, sparsity):
    mask = magnitude_mask(weight, sparsity)
    expected = by_sorting(weight.abs().flatten().numpy(), int(sparsity * weight.numel()))
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.flatten().numpy(), expected)


@pytest.mark.parametrize(("pattern", "block"), [("4x1", (4, 1)), ("1x4", (1, 4))])
@given(data=st.data(), sparsity=SPARSITIES)
def test_blocks_go_together_by_their_mean(pattern, block, data, sparsity):
    weight = data.draw(weights((4, 4), block))
    mask = magnitude_mask(weight, sparsity, pattern)
    (height, width), (r, c) = weight.shape, block
    blocks = weight.abs().view(height // r, r, width // c, c).permute(0, 2, 1, 3).reshape(-1, r * c)
    kept = mask.view(height // r, r, width // c, c).permute(0, 2, 1, 3).reshape(-1, r * c)
    assert bool((kept.all(1) == kept.any(1)).all())
    expected = by_sorting(blocks.mean(1).numpy(), int(sparsity * len(blocks)))
    np.testing.assert_array_equal(kept[:, 0].numpy(), expected)


def test_orientation_of_blocks():
    weight = torch.ones(8, 8)
    weight[4:8, 3] = 0.1  # 4 consecutive output rows, 1 input column
    pruned = ~magnitude_mask(weight, 1 / 16, "4x1")
    assert pruned.nonzero().tolist() == [[4, 3], [5, 3], [6, 3], [7, 3]]
    pruned = ~magnitude_mask(weight.T.contiguous(), 1 / 16, "1x4")
    assert pruned.nonzero().tolist() == [[3, 4], [3, 5], [3, 6], [3, 7]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 3)])
@given(data=st.data())
def test_n_of_m_keeps_exactly_the_largest_n_at_the_end(n, m, data):
    weight = data.draw(weights((4, 3), (1, m)))
    pattern = f"{n}:{m}"
    kept = magnitude_mask(weight, final_of(pattern), pattern).view(-1, m).numpy()
    groups = weight.abs().view(-1, m).numpy()
    for group, mask in zip(groups, kept, strict=True):
        np.testing.assert_array_equal(mask, by_sorting(group, m - n))


@given(weights((4, 3), (1, 4)), st.one_of(st.floats(0, 0.499), st.just(0.5)))
def test_n_of_m_ramp_prunes_the_groups_that_lose_least(weight, sparsity):
    kept = magnitude_mask(weight, sparsity, "2:4").view(-1, 4).numpy()
    groups = weight.abs().view(-1, 4)
    removed = groups.sort(dim=1).values[:, :2].sum(1).numpy()
    untouched = by_sorting(removed, int(sparsity / 0.5 * len(groups)))
    np.testing.assert_array_equal(kept.all(1), untouched)
    assert set(kept.sum(1)) <= {2, 4}


@settings(max_examples=50)
@given(st.lists(weights(), min_size=1, max_size=4), SPARSITIES)
def test_global_is_one_stable_sort_over_all_layers(layers, sparsity):
    named = {str(i): layer for i, layer in enumerate(layers)}
    masks = dict(global_masks(named, sparsity))
    scores = torch.cat([layer.abs().flatten() for layer in layers]).numpy()
    got = torch.cat([masks[name].flatten() for name in named]).numpy()
    np.testing.assert_array_equal(got, by_sorting(scores, int(sparsity * len(scores))))


@pytest.mark.parametrize("pattern", ["4x1", "1x4", "2:4"])
def test_global_works_on_blocks_and_groups(pattern):
    generator = torch.Generator().manual_seed(1)
    layers = {str(i): torch.randn(16, 32, generator=generator) * (i + 1) for i in range(3)}
    sparsity = 0.37
    masks = dict(global_masks(layers, sparsity, pattern))
    scores = torch.cat([unit_scores(w, pattern) for w in layers.values()]).numpy()
    share = sparsity / (final_of(pattern) or 1)
    # Each pattern alone has the same units for a layer as the global selection, so counts must add up.
    units = {"4x1": 4, "1x4": 4, "2:4": 2}[pattern]
    assert sum(int((~m).sum()) for m in masks.values()) == units * int(share * len(scores))
    assert (~masks["0"]).sum() > (~masks["2"]).sum()
    threshold = np.sort(scores)[int(share * len(scores)) - 1]
    for name, weight in layers.items():
        alone = (unit_scores(weight, pattern) <= threshold).sum() * units
        assert (~masks[name]).sum() == alone


@pytest.mark.parametrize(("shape", "pruned"), [((768, 768), 530841), ((768, 3072), 2123366)])
def test_counts_of_the_published_models(shape, pruned):
    mask = magnitude_mask(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 0.9)
    assert int((~mask).sum()) == pruned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype):
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(magnitude_mask(weight, 0.9), magnitude_mask(weight.float(), 0.9))


def test_a_transposed_weight_is_selected_by_its_own_positions():
    weight = torch.randn(8, 4).T
    for pattern in ("unstructured", "4x1", "1x4", "2:4"):
        expected = magnitude_mask(weight.contiguous(), 0.5, pattern)
        assert torch.equal(magnitude_mask(weight, 0.5, pattern), expected)


def test_selection_leaves_the_weight_alone():
    weight = torch.randn(16, 16)
    before = weight.clone()
    magnitude_mask(weight, 0.5)
    dict(global_masks({"a": weight}, 0.5, "4x1"))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 90, float("nan")])
def test_sparsity_must_be_a_fraction(sparsity):
    with pytest.raises(InputError, match=r"sparsity is .* but must be at least 0 and below 1"):
        magnitude_mask(torch.ones(4, 4), sparsity)


@pytest.mark.parametrize("pattern", ["2x2", "4:4", "0:4", "5:4", "block", "2:4:6", "02:4", "2:104", ""])
def test_unknown_patterns(pattern):
    with pytest.raises(InputError, match="wanted unstructured, 4x1, 1x4 or n:m"):
        magnitude_mask(torch.ones(4, 4), 0.5, pattern)


@pytest.mark.parametrize(("pattern", "shape"), [("4x1", (6, 4)), ("1x4", (4, 6)), ("2:4", (4, 6))])
def test_a_shape_that_does_not_divide_is_named(pattern, shape):
    with pytest.raises(InputError, match=rf"layer.3: shape {shape[0]}x{shape[1]} .* does not divide into {pattern}"):
        check_shape("layer.3", shape, pattern)
    with pytest.raises(InputError, match="does not divide"):
        magnitude_mask(torch.ones(shape), 0.5, pattern)


def test_n_of_m_cannot_be_exceeded():
    with pytest.raises(InputError, match=r"sparsity is 0.6 but pattern 2:4 cannot exceed 0.5"):
        magnitude_mask(torch.ones(4, 4), 0.6, "2:4")


@pytest.mark.parametrize(
    ("model", "layers", "pooler"),
    [
        (lambda: tiny_bert(), 12, True),
        (lambda: tiny_bert(BertModel), 12, True),
        (lambda: tiny_bert(BertForQuestionAnswering), 12, False),
        (lambda: tiny_distilbert(), 12, False),
        (lambda: tiny_distilbert(DistilBertForQuestionAnswering), 12, False),
        (lambda: tiny_roberta(), 12, False),
        (lambda: tiny_roberta(RobertaModel), 12, True),
        (lambda: tiny_mpnet(), 12, False),
    ],
)
def test_prunable_finds_the_encoder_and_the_pooler_and_no_head(model, layers, pooler):
    model = model()
    found = prunable(model)
    parameters = dict(model.named_parameters())
    assert len(found) == layers + pooler
    assert any(name.endswith("pooler.dense.weight") for name in found) == pooler
    for name, weight in found.items():
        assert weight is parameters[name]
        assert ".layer." in name or "pooler" in name


def test_relative_position_embeddings_are_no_linears():
    assert not is_encoder_weight("encoder.layer.0.attention.self.distance_embedding.weight", 2)


def test_prunable_skips_lists_tied_weights_once_and_refuses_other_models():
    model = tiny_bert()
    model.bert.encoder.layer[1].attention.self.key.weight = model.bert.encoder.layer[0].attention.self.key.weight
    assert len(prunable(model)) == 12
    assert not [n for n in prunable(model, [r"\.key\.", "pooler"]) if "key" in n or "pooler" in n]
    with pytest.raises(InputError, match=r"skip: '\(' is not a regular expression"):
        prunable(model, ["("])
    with pytest.raises(
        InputError, match=r"skip: 'layer\\\\\.12' matches no layer, wanted part of a name such as bert\.enc"
    ):
        prunable(model, ["key", r"layer\.12"])
    assert prunable(tiny_distilbert(), ["pooler", r"pooler\.dense\.weight$", "embeddings"])  # rules for all families
    assert prunable(tiny_bert(), [r"^bert\.pooler\.dense"])
    with pytest.raises(InputError, match=r"skip is 'pooler', wanted a list of regular expressions"):
        prunable(tiny_bert(), "pooler")
    with pytest.raises(InputError, match=r"Linear: no Linear layer named encoder\.layer\.N"):
        prunable(torch.nn.Linear(4, 4))
