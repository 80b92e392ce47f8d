"""Layer-wise pruning: the fit against every possible mask, and against pruning by magnitude."""

from copy import deepcopy
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, DistilBertForMaskedLM, MPNetForMaskedLM, RobertaForMaskedLM

from pruneofa.errors import CheckFailed, InputError
from pruneofa.train import layerwise
from pruneofa.train.layerwise import DAMPING, _fit_linear, prune_layerwise, sparse_fit
from pruneofa.train.masks import magnitude_mask, prunable
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta


def _problem(seed: int, inputs: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A dense row, and the moments of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(200, inputs)) @ rng.normal(size=(inputs, inputs))).float()
    weight = torch.from_numpy(rng.normal(size=(1, inputs))).float()
    return weight, x.T @ x / len(x), x.T @ (x @ weight.T) / len(x)


def _loss(weight: torch.Tensor, dense: torch.Tensor, moments: torch.Tensor) -> float:
    """Mean squared error of the output plus the damping, which is what the fit makes small."""
    difference = (weight - dense).double()
    damping = DAMPING * moments.diagonal().mean()
    return float((difference @ moments.double() @ difference.T).sum() + damping * (difference**2).sum())


def _best(dense: torch.Tensor, moments: torch.Tensor, kept: int) -> float:
    """The smallest loss over every mask, each with the weights that are best for it."""
    full = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    best = float("inf")
    for chosen in combinations(range(len(moments)), kept):
        index = list(chosen)
        weight = torch.zeros_like(dense)
        weight[0, index] = torch.linalg.solve(full[index][:, index].double(), (full @ dense[0]).double()[index]).float()
        best = min(best, _loss(weight, dense, moments))
    return best


def test_the_fit_is_close_to_the_best_of_all_masks() -> None:
    ratios, by_magnitude = [], []
    for seed in range(20):
        dense, moments, products = _problem(seed)
        weight = sparse_fit(dense, moments, products, lambda scores: magnitude_mask(scores, 0.5))
        assert int((weight != 0).sum()) == 4 and not torch.signbit(weight[weight == 0]).any()
        best = _best(dense, moments, 4)
        ratios.append(_loss(weight, dense, moments) / best)
        by_magnitude.append(_loss(dense * magnitude_mask(dense, 0.5), dense, moments) / best)
    assert min(ratios) > 1 - 1e-3
    assert np.median(ratios) < 1.2 and np.median(by_magnitude) > 2


@pytest.mark.parametrize("pattern", ["4x1", "2:4"])
def test_the_fit_keeps_patterns(pattern: str) -> None:
    dense = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    moments = torch.eye(16)
    weight = sparse_fit(dense, moments, dense.T.clone(), lambda scores: magnitude_mask(scores, 0.5, pattern))
    groups = weight.view(2, 4, 16).transpose(1, 2).reshape(-1, 4) if pattern == "4x1" else weight.view(-1, 4)
    counts = (groups != 0).sum(1)
    assert set(counts.tolist()) == ({0, 4} if pattern == "4x1" else {2})
    # Independent inputs: what is kept stays as it was.
    torch.testing.assert_close(weight[weight != 0], dense[weight != 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny_bert, BertForMaskedLM),
        (tiny_distilbert, DistilBertForMaskedLM),
        (tiny_roberta, RobertaForMaskedLM),
        (tiny_mpnet, MPNetForMaskedLM),
    ],
)
def test_a_model_loses_less_than_by_magnitude(make, kind) -> None:
    teacher = make(kind).eval()
    with torch.no_grad():  # weights as of a trained model, not of the initialization's size
        for weight in prunable(teacher).values():
            weight.mul_(8)
    student, plain = deepcopy(teacher), deepcopy(teacher)
    ids = torch.randint(10, teacher.config.vocab_size, (64, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, 8:] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(16), mask.split(16), strict=True)]
    skipped = next(iter(prunable(teacher)))
    prune_layerwise(student, teacher, batches[:3], final=0.75, skip=[skipped])
    torch.testing.assert_close(prunable(student)[skipped], prunable(teacher)[skipped], rtol=0, atol=0)
    with torch.no_grad():
        for name, weight in prunable(plain, [skipped]).items():
            weight.mul_(magnitude_mask(weight, 0.75))
            assert int((prunable(student)[name] == 0).sum()) == int(0.75 * weight.numel())

        def error(model) -> float:
            wanted, got = (m.base_model(**batches[3]).last_hidden_state for m in (teacher, model))
            return float(((wanted - got)[batches[3]["attention_mask"].bool()] ** 2).mean())

        assert error(student) < 0.8 * error(plain)


def test_layers_that_were_pruned_before_an_interruption_are_read(tmp_path, monkeypatch) -> None:
    teacher = tiny_bert(BertForMaskedLM).eval()
    ids = torch.randint(10, teacher.config.vocab_size, (32, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]
    straight, broken, resumed = (deepcopy(teacher) for _ in range(3))
    assert prune_layerwise(straight, teacher, batches, final=0.5) == 0
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(layerwise, "time", clock)
    fitted: list[str] = []

    def fit(linear, rows, select, name) -> None:
        if len(fitted) == 8 and not resuming:  # within the second of two layers
            raise KeyboardInterrupt
        fitted.append(name)
        clock.now += 10
        _fit_linear(linear, rows, select, name)

    monkeypatch.setattr(layerwise, "_fit_linear", fit)
    resuming = False
    with pytest.raises(KeyboardInterrupt):
        prune_layerwise(broken, teacher, batches, final=0.5, kept=tmp_path / "layers")
    resuming = True
    fitted.clear()
    seconds = prune_layerwise(resumed, teacher, batches, final=0.5, kept=tmp_path / "layers")
    assert len(fitted) == 6  # those of the second layer
    assert seconds == 60  # that the first layer took
    for (name, wanted), got in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(wanted, got), name


def test_a_pattern_that_does_not_divide_is_refused_before_anything_is_pruned() -> None:
    teacher = tiny_bert(BertForMaskedLM, intermediate_size=62)
    student = deepcopy(teacher)
    with pytest.raises(InputError, match="does not divide into 4x1"):
        prune_layerwise(student, teacher, [], final=0.5, pattern="4x1")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_inputs_that_hardly_vary_are_fitted_by_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(16, 8)
    inputs = 3.0 + 1e-4 * torch.randn(200, 16, generator=generator)
    wanted = linear(inputs).detach()
    with torch.no_grad():
        _fit_linear(linear, [(inputs, wanted)], lambda scores: magnitude_mask(scores, 0.75), "linear")
    assert int((linear.weight == 0).sum()) == 96
    torch.testing.assert_close(linear(inputs), wanted, atol=1e-3, rtol=0)


def fitted(inputs):
    """A linear pruned to 0.75 on these inputs, and the dense one."""
    dense = torch.nn.Linear(16, 8)
    linear = deepcopy(dense)
    with torch.no_grad():
        _fit_linear(linear, [(inputs, dense(inputs))], lambda scores: magnitude_mask(scores, 0.75), "linear")
    assert linear.weight.isfinite().all() and int((linear.weight == 0).sum()) == 96
    return linear, dense


def test_dead_inputs_are_pruned_first() -> None:
    inputs = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    inputs[:, [2, 5]] = 0.0
    linear, _ = fitted(inputs)
    assert (linear.weight[:, [2, 5]] == 0).all()
    linear, dense = fitted(torch.zeros(50, 16))  # all of them are dead
    torch.testing.assert_close(linear(torch.zeros(1, 16)), dense(torch.zeros(1, 16)))


def test_singular_moments_are_damped() -> None:
    inputs = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    few = inputs[:3]  # fewer examples than inputs
    linear, dense = fitted(few)
    torch.testing.assert_close(linear(few), dense(few), atol=0.05, rtol=0)
    same = inputs.clone()
    same[:, 1::2] = same[:, ::2]  # every input twice
    fitted(same)


@pytest.mark.parametrize("bad", ["an infinite input", "NaN", "squares that overflow", "what fp16 made of it"])
def test_numbers_that_are_not_finite_are_called_so(bad) -> None:
    inputs = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    if bad == "squares that overflow":
        inputs *= 1e20
    elif bad == "what fp16 made of it":
        inputs = (inputs * 1e5).half()
    else:
        inputs[0, 0] = float("nan") if bad == "NaN" else float("inf")
    linear = torch.nn.Linear(16, 8)
    with torch.no_grad(), pytest.raises(CheckFailed, match="linear: its inputs, .* too large for float32; prune a mo"):
        _fit_linear(linear, [(inputs, linear(inputs.float()))], lambda s: magnitude_mask(s, 0.75), "linear")
