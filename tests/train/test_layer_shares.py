"""The shares of layers under one threshold, against NumPy."""

import numpy as np
import pytest
import torch
from transformers import BertModel, DistilBertModel, MPNetModel

from pruneofa.train.layer_shares import layer_shares, mask_of_share
from pruneofa.train.masks import prunable
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet


def _batches(model):
    ids = torch.randint(5, model.config.vocab_size, (8, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(3), mask.split(3), strict=True)]


@pytest.mark.parametrize(
    ("make", "kind"), [(tiny_bert, BertModel), (tiny_distilbert, DistilBertModel), (tiny_mpnet, MPNetModel)]
)
def test_one_threshold_of_the_relative_errors(make, kind):
    model = make(kind).eval()
    batches = _batches(model)
    seen = {name: ([], []) for name in prunable(model)}

    def keep(name, given, made):
        seen[name][0].append(given)
        seen[name][1].append(made)

    for name in seen:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(lambda _, given, made, name=name: keep(name, given[0], made))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    real = [batch["attention_mask"].bool() for batch in batches]
    scores = {}
    for name, (given, made) in seen.items():
        x, y = (
            np.concatenate([(v[r] if v.dim() == 3 else v).double().numpy() for v, r in zip(side, real, strict=True)])
            for side in (given, made)
        )
        scores[name] = prunable(model)[name].detach().double().numpy() ** 2 * x.var(0) / y.var(0).sum()
    order = np.sort(np.concatenate([s.ravel() for s in scores.values()]))
    threshold = order[int(0.7 * len(order))]
    shares = layer_shares(model, batches, 0.7)
    for name, (pruned, total) in shares.items():
        assert total == scores[name].size
        assert pruned == int((scores[name] < threshold).sum()), name
    assert sum(pruned for pruned, _ in shares.values()) == int(0.7 * sum(total for _, total in shares.values()))
    assert len({pruned / total for pruned, total in shares.values()}) > 3


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
def test_a_mask_has_as_many_weights_as_the_share_says(pattern):
    scores = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    most = 48 if pattern == "2:4" else 96
    step = {"unstructured": 1, "2:4": 2}.get(pattern, 4)
    for pruned in range(0, most + 1, step):
        kept = mask_of_share(scores, (pruned, 96), pattern)
        assert int((~kept).sum()) == pruned
