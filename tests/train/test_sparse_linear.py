"""Linear layers that skip locked zeros: results and gradients of nn.Linear, in training too; nothing else changes."""

import copy
import itertools
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pruneofa.errors import InputError
from pruneofa.run import estimate
from pruneofa.train import callbacks, sparse_linear
from pruneofa.train.callbacks import LockCallback
from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.quantize import FakeQuantizer
from pruneofa.train.sparse_linear import (
    SparseLinear,
    can_skip,
    compute_densely,
    is_masked,
    note_zeroed,
    skip_locked_zeros,
)
from tests.tiny import tiny_bert
from tests.train.fits import fit, losses, objective, small_text


def sparse_layer(inputs, outputs, *, kept=0.1, bias=True, seed=0):
    """A layer, where it is pruned, and an equal layer that skips its zeros."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(inputs, outputs, bias=bias)
    order = torch.randperm(outputs * inputs, generator=generator).view(outputs, inputs)
    pruned = order >= int(kept * order.numel())
    with torch.no_grad():
        dense.weight.copy_(torch.randn(outputs, inputs, generator=generator).masked_fill_(pruned, 0))
    sparse = copy.deepcopy(dense)
    assert skip_locked_zeros(sparse, {"w": sparse.weight}, {"w": pruned}) == [sparse]
    return dense, pruned, sparse


def gradients(layer, x, dy):
    """y and the gradients of x, of the weight and of the bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, layer.weight.grad, *([] if layer.bias is None else [layer.bias.grad])]


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(), (1,), (3,), (65,), (2, 7), (0,), (3, 1, 5)]),
    inputs=st.integers(1, 70), outputs=st.integers(1, 70),
    kept=st.sampled_from([0.0, 0.1, 0.2]), bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_results_and_gradients_are_those_of_a_linear_layer(shape, inputs, outputs, kept, bias, seed):
    dense, pruned, sparse = sparse_layer(inputs, outputs, kept=kept, bias=bias, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(*shape, size, generator=generator) for size in (inputs, outputs))
    wanted, found = gradients(dense, x, dy), gradients(sparse, x, dy)
    wanted[2] = wanted[2].masked_fill(pruned, 0)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_inputs_and_gradients_of_any_memory_order():
    dense, pruned, sparse = sparse_layer(24, 40)
    x = torch.randn(24, 9).t()
    for y in ((layer(x).t().contiguous() ** 2).sum() for layer in (dense, sparse)):
        y.backward()
    assert not sparse(x.expand(3, 9, 24)).isnan().any()
    sparse(x).sum().backward()  # whose gradient is one number, expanded
    dense(x).sum().backward()
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad.masked_fill(pruned, 0), rtol=1e-4, atol=1e-4)


def products(y):
    return "Products" in type(y.grad_fn.next_functions[0][0] or y.grad_fn).__name__ if y.grad_fn else False


def test_where_it_does_not_fit_it_is_a_linear_layer():
    _, _, sparse = sparse_layer(24, 40)
    x = torch.randn(5, 24)
    assert products(sparse(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16
    assert not products(copy.deepcopy(sparse).double()(x.double()))
    replaced = sparse.weight
    sparse.weight = nn.Parameter(torch.ones(40, 24))  # no zeros in it
    torch.testing.assert_close(sparse(x)[:, 0] - sparse.bias[0], x.sum(1), rtol=1e-4, atol=1e-4)
    sparse.weight = replaced
    assert products(sparse(x))
    assert not products(sparse.eval()(x)) and products(sparse.train()(x))
    compute_densely([sparse])
    assert type(sparse) is nn.Linear and not products(sparse(x))


def test_the_transforms_of_torch():
    dense, _, sparse = sparse_layer(24, 40)
    x, tangent = torch.randn(5, 24), torch.randn(5, 24)
    for transform in (
        lambda layer: torch.func.vmap(layer)(x),
        lambda layer: torch.func.jvp(layer, (x,), (tangent,))[1],
        lambda layer: torch.func.grad(lambda given: layer(given).pow(2).sum())(x),
        lambda layer: torch.compile(layer, backend="eager", fullgraph=True)(x),
    ):
        torch.testing.assert_close(transform(sparse), transform(dense))


@pytest.mark.parametrize("change", ["add_", "data", "load_state_dict"])
def test_a_changed_weight_is_multiplied_densely_until_it_is_zeroed(change):
    _, pruned, sparse = sparse_layer(24, 40)
    x, other = torch.randn(5, 24), torch.randn(40, 24)
    with torch.no_grad():
        if change == "add_":
            other = sparse.weight + other
            sparse.weight.copy_(other)
        elif change == "data":
            sparse.weight.data = other
        else:
            sparse.load_state_dict({"weight": other, "bias": sparse.bias})
    y = sparse(x)
    torch.testing.assert_close(y, nn.functional.linear(x, other, sparse.bias))
    with torch.no_grad():
        sparse.weight.masked_fill_(pruned, 0)
    assert not products(y) and not products(sparse(x))
    note_zeroed([sparse])
    assert products(sparse(x))
    compute_densely([sparse])
    note_zeroed([sparse])  # as a callback does whose layers another one has changed
    assert not products(sparse(x))


def test_memory_order_of_weights_and_masks():
    pruned = torch.arange(960).view(40, 24) % 10 > 0
    layer = nn.Linear(24, 40)
    layer.weight = nn.Parameter(torch.ones(24, 40).t().masked_fill_(pruned, 0))
    assert not layer.weight.is_contiguous()
    assert skip_locked_zeros(layer, {"w": layer.weight}, {"w": layer.weight == 0}) == []
    layer.weight = nn.Parameter(torch.ones(40, 24).masked_fill(pruned, 0))
    x = torch.randn(5, 24)
    wanted = layer(x)
    assert skip_locked_zeros(layer, {"w": layer.weight}, {"w": pruned.t().contiguous().t()}) == [layer]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_unknown_instructions_are_named(monkeypatch):
    monkeypatch.setenv("PRUNEOFA_ISA", "sse9")
    with pytest.raises(InputError, match="^PRUNEOFA_ISA is 'sse9', which this CPU does not run; wanted one of"):
        sparse_layer(24, 40)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_dense(copied):
    _, _, sparse = sparse_layer(24, 40)
    other = copied(sparse)
    with torch.no_grad():
        other.weight = nn.Parameter(torch.ones(40, 24))
    x = torch.randn(5, 24)
    torch.testing.assert_close(other(x)[:, 0] - other.bias[0], x.sum(1), rtol=1e-4, atol=1e-4)
    assert set(other.state_dict()) == {"weight", "bias"}


def test_what_changes_the_weights_in_place_counts():
    dense, _, sparse = sparse_layer(24, 40)
    x = torch.randn(5, 24)
    for layer in (dense, sparse):
        layer.weight.data.mul_(3)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-4)
    y = sparse(x)
    with torch.no_grad():
        sparse.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_gradients():
    dense, pruned, sparse = sparse_layer(12, 16)
    x = torch.randn(5, 12)
    results = []
    for layer in (dense, sparse):
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(given).pow(2).sum(), given, create_graph=True)
        first.pow(2).sum().backward()
        results.append(layer.weight.grad.masked_fill(pruned, 0))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_layers_that_gain_nothing_stay_as_they_are():
    dense, pruned = nn.Linear(24, 40), torch.arange(960).view(40, 24) % 10 < 7
    own = nn.Linear(24, 40)
    own.forward = partial(nn.functional.linear, weight=own.weight)
    frozen = nn.Embedding(40, 24)
    model = nn.ModuleList([dense, own, frozen, nn.Linear(24, 40)])
    weights = {"dense": dense.weight, "own": own.weight}
    everything = torch.ones(40, 24, dtype=torch.bool)
    assert skip_locked_zeros(model, weights, {"dense": pruned, "own": everything}) == []
    assert skip_locked_zeros(model.double(), {"dense": dense.weight}, {"dense": everything}) == []


def test_only_weights_that_are_trained_have_gradients():
    _, _, sparse = sparse_layer(24, 40)
    sparse.weight.requires_grad_(False)
    sparse(torch.randn(5, 24)).sum().backward()
    assert sparse.weight.grad is None and sparse.bias.grad is not None
    sparse.requires_grad_(False)
    assert not sparse(torch.randn(5, 24)).requires_grad


def prune_model(model, sparsity=0.9):
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.masked_fill_(~magnitude_mask(weight, sparsity), 0)
    return model


def sparse_classifier():
    return prune_model(tiny_bert(BertForSequenceClassification, num_labels=2))


def sparse_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


class Stop(TrainerCallback):
    """Counts layers that skip zeros, and stops after a step."""

    def __init__(self, step=None):
        self.step, self.counts = step, set()

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.add(len(sparse_layers(kwargs["model"])))
        if state.global_step == self.step:
            raise InterruptedError


def trained(tmp_path, name, *, lock=None, stop=None, dropout=0.0, **options):
    text, made, events = small_text(tmp_path), objective(dropout=dropout), []
    prune_model(made.student)
    start = {n: w.detach() == 0 for n, w in prunable(made.student).items()}
    torch.manual_seed(0)
    callbacks = [lock or LockCallback(), stop or Stop()]
    try:
        fit(made, text, tmp_path / name, steps=6, events=events, callbacks=callbacks, **options)
    except InterruptedError:
        assert sparse_layers(made.student) == []
        return None
    assert sparse_layers(made.student) == []
    for n, w in prunable(made.student).items():
        assert torch.equal(w == 0, start[n]) and not (w.signbit() & (w == 0)).any(), n
    return made.student.state_dict(), losses(events)


@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"micro_batch": 2}])
def test_training_computes_the_same_losses(tmp_path, options):
    skipping, dense = Stop(), Stop()
    state, found = trained(tmp_path, "sparse", stop=skipping, **options)
    other, wanted = trained(tmp_path, "dense", lock=LockCallback(skip_zeros=False), stop=dense, **options)
    assert (skipping.counts, dense.counts) == ({2 * 6 + 1}, {0})
    assert found == pytest.approx(wanted, rel=1e-4) and len(found) == 6
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=1e-2, atol=3e-4, msg=name)
    assert any(not torch.equal(value, other[name]) for name, value in state.items())  # it does compute otherwise


def test_training_that_resumes_ends_with_the_same_bits(tmp_path):
    once, _ = trained(tmp_path, "once", dropout=0.1)
    assert trained(tmp_path, "twice", dropout=0.1, save_steps=2, stop=Stop(5)) is None
    twice, _ = trained(tmp_path, "twice", dropout=0.1, save_steps=2)
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


def test_the_lock_masks_gradients_of_other_losses_too():
    model = sparse_classifier().train()
    lock = PatternLock.capture(model)
    layers = skip_locked_zeros(model, lock.weights, lock.pruned)
    seen = []
    for weight in lock.weights.values():
        weight.register_hook(lambda gradient: seen.append(is_masked(gradient)))  # after the lock's
    ids = torch.randint(5, 100, (4, 8))
    for others in (0, 1, 2):
        model.zero_grad()
        loss = model(input_ids=ids, labels=torch.zeros(4, dtype=torch.long)).loss
        for _ in range(others):
            loss = loss + sum((weight * 0.1).sum() for weight in lock.weights.values())
        loss.backward()
        for name, weight in lock.weights.items():
            assert not weight.grad[lock.pruned[name]].any(), name
            assert (weight.grad != 0).any()
    assert seen == [True] * len(layers) + [False] * 2 * len(layers)  # of the sparse product alone nothing is to be done


def test_quantization_aware_layers_are_left():
    model = sparse_classifier().train()
    FakeQuantizer(model)
    lock = PatternLock.capture(model)
    assert skip_locked_zeros(model, lock.weights, lock.pruned) == []


def stock_trainer(model, folder, *callbacks, **options):
    rows = [{"input_ids": torch.arange(5, 13) + i, "labels": torch.tensor(i % 2)} for i in range(16)]
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", num_train_epochs=1,
        per_device_train_batch_size=4, **options,
    )  # fmt: skip
    return Trainer(model, args, train_dataset=rows, callbacks=list(callbacks))


@pytest.fixture
def multiplied(monkeypatch):
    """Collects the shape of the weight in every sparse product."""
    shapes, apply = [], sparse_linear._Products.apply

    def record(x, weight, *rest):
        shapes.append(tuple(weight.shape))
        return apply(x, weight, *rest)

    monkeypatch.setattr(sparse_linear._Products, "apply", record)
    return shapes


def test_any_trainer_skips_zeros_in_every_step(tmp_path, multiplied):
    model, seen = sparse_classifier(), Stop()
    start = {name: weight.detach() == 0 for name, weight in prunable(model).items()}
    stock_trainer(model, tmp_path, LockCallback(), seen).train()
    assert seen.counts == {2 * 6 + 1} and len(multiplied) == 4 * (2 * 6 + 1)
    assert sparse_layers(model) == []
    for name, weight in prunable(model).items():
        assert torch.equal(weight == 0, start[name]), name


def test_a_model_after_an_interruption(tmp_path, multiplied):
    model = sparse_classifier()
    with pytest.raises(InterruptedError):
        stock_trainer(model, tmp_path, LockCallback(), Stop(2)).train()
    ids = torch.arange(5, 13)[None]
    other = tiny_bert(BertForSequenceClassification, num_labels=2, seed=1)
    model.load_state_dict(other.state_dict())
    for mode in (True, False):
        torch.manual_seed(0)
        found = model.train(mode)(input_ids=ids).logits
        torch.manual_seed(0)
        torch.testing.assert_close(found, other.train(mode)(input_ids=ids).logits)

    # Another pattern, with one layer that has no zeros now.
    prune_model(model)
    full = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        full.weight.fill_(0.01)
    multiplied.clear()
    seen = Stop()
    stock_trainer(model, tmp_path, LockCallback(), seen).train()
    assert seen.counts == {2 * 6} and len(multiplied) == 4 * 2 * 6
    assert sparse_layers(model) == [] and (full.weight != 0).all()


def test_a_compiled_model_computes_densely(tmp_path, multiplied):
    model = sparse_classifier()
    model.compile(backend="eager")
    stock_trainer(model, tmp_path, LockCallback(), max_steps=1).train()
    assert multiplied == [] and sparse_layers(model) == []
    assert all((weight == 0).float().mean() > 0.89 for weight in prunable(model).values())


@pytest.mark.parametrize("options", [{"bf16": True}, {"torch_compile": True}, {"world_size": 2}])
def test_where_other_products_are_computed_no_layer_changes(tmp_path, options):
    model, callback = sparse_classifier(), LockCallback()
    args = stock_trainer(model, tmp_path).args
    control = {"state": TrainerState(), "control": TrainerControl(), "model": model}
    callback.on_train_begin(args, **control)
    assert len(sparse_layers(model)) == 2 * 6 + 1
    changed = SimpleNamespace(**{name: getattr(args, name) for name in ("world_size", "torch_compile", "bf16", "fp16")})
    vars(changed).update(options)
    callback.on_train_begin(changed, **control)
    assert sparse_layers(model) == []


def test_where_training_may_skip_zeros():
    for processes, reduced, compiled in itertools.product((1, 2), (False, True), (False, True)):
        found = can_skip(processes=processes, reduced=reduced, compiled=compiled)
        assert found == ((processes, reduced, compiled) == (1, False, False))
    assert estimate.can_skip is callbacks.can_skip is can_skip  # the estimate times what training will do
