import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForQuestionAnswering, BertForSequenceClassification

from pruneofa.errors import CheckFailed, InputError
from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.prune import GradualPruner
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta


def make_sparse(model, sparsity=0.7):
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.mul_(magnitude_mask(weight, sparsity))  # the multiplication leaves -0.0 on purpose
    return model


def batch(model, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (4, 8), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 2, (4,), generator=generator)}


def train(model, steps, *, lock=None, optimizer=None, first=0):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(**batch(model, step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if lock:
            lock.apply()
    return optimizer


def negative_zeros(weight):
    return int(((weight == 0) & weight.signbit()).sum())


@pytest.fixture
def model():
    return make_sparse(tiny_bert(BertForSequenceClassification, num_labels=2))


def test_fifty_steps_of_momentum_decay_and_clipping_revive_nothing(model):
    before = {name: weight.detach() == 0 for name, weight in prunable(model).items()}
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lock = PatternLock.capture(model)
    train(model, 50, lock=lock)
    lock.verify()
    for name, weight in prunable(model).items():
        assert torch.equal(weight == 0, before[name])
        assert torch.equal(lock.masks[name], ~before[name])
        assert negative_zeros(weight) == 0
    trained = dict(model.named_parameters())
    assert not torch.equal(
        trained["bert.embeddings.word_embeddings.weight"], start["bert.embeddings.word_embeddings.weight"]
    )
    assert not torch.equal(trained["classifier.weight"], start["classifier.weight"])


def test_without_the_lock_the_pattern_is_lost_and_verify_says_where(model):
    lock = PatternLock.capture(model)
    lock.release()
    train(model, 1)
    with pytest.raises(CheckFailed, match=r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight: \d+ pruned"):
        lock.verify()


def test_verify_finds_one_weight(model):
    lock = PatternLock.capture(model)
    name, weight = list(prunable(model).items())[7]
    position = (weight == 0).nonzero()[3]
    with torch.no_grad():
        weight[tuple(position)] = 1e-40
    with pytest.raises(CheckFailed, match=rf"{name}: 1 pruned weight is not zero"):
        lock.verify()
    lock.apply()
    lock.verify()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pruned_weight_that_is_no_number_is_called_so(model, value):
    lock = PatternLock.capture(model)
    name, weight = list(prunable(model).items())[7]
    with torch.no_grad():
        weight[tuple((weight == 0).nonzero()[3])] = value
    message = rf"{name}: 1 pruned weight is NaN or infinite; training diverged: lower lr"
    for check in (lock.verify, lambda: (lock.apply(), lock.verify())):
        with pytest.raises(CheckFailed, match=message):
            check()
    with pytest.raises(CheckFailed, match="1 pruned weight is NaN or infinite in the file; training diverged"):
        lock.verify_in({name: weight}, "the file")


def test_gradients_are_zero_before_clipping_so_the_norm_counts_only_living_weights(model):
    free = copy.deepcopy(model)
    lock = PatternLock.capture(model)
    for each in (model, free):
        each(**batch(each, 0)).loss.backward()
    expected = []
    for (name, locked), (_, plain) in zip(model.named_parameters(), free.named_parameters(), strict=True):
        gradient = plain.grad.masked_fill(lock.pruned[name], 0.0) if name in lock.pruned else plain.grad
        torch.testing.assert_close(locked.grad, gradient, rtol=0, atol=0)
        expected.append(gradient.norm() ** 2)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, torch.stack(expected).sum().sqrt())
    assert norm < torch.nn.utils.clip_grad_norm_(free.parameters(), 1e9)


def test_accumulated_gradients_stay_zero(model):
    lock = PatternLock.capture(model)
    for seed in range(3):
        model(**batch(model, seed)).loss.backward()
    for name, weight in prunable(model).items():
        assert not weight.grad[lock.pruned[name]].any()
        assert weight.grad.any()


def test_tied_weights_are_locked_once_and_stay_tied(model):
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    lock = PatternLock.capture(model)
    train(model, 5, lock=lock)
    lock.verify()
    assert layers[1].intermediate.dense.weight is layers[0].intermediate.dense.weight
    assert bool(
        (layers[1].intermediate.dense.weight[lock.pruned["bert.encoder.layer.0.intermediate.dense.weight"]] == 0).all()
    )


def test_resume_is_bit_identical(model, tmp_path):
    straight = copy.deepcopy(model)
    train(straight, 10, lock=PatternLock.capture(straight))

    lock = PatternLock.capture(model)
    optimizer = train(model, 5, lock=lock)
    save_file(lock.state_dict(), tmp_path / "lock.safetensors")
    resumed = tiny_bert(BertForSequenceClassification, num_labels=2)
    resumed.load_state_dict(model.state_dict())
    with torch.no_grad():  # a living weight that happens to be zero at the checkpoint is not locked by it
        assert (kept := lock.masks["bert.encoder.layer.0.output.dense.weight"]).any()
    again = PatternLock.capture(resumed)
    again.load_state_dict(load_file(tmp_path / "lock.safetensors"))
    assert torch.equal(again.masks["bert.encoder.layer.0.output.dense.weight"], kept)
    new_optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.01, weight_decay=0.1)
    new_optimizer.load_state_dict(optimizer.state_dict())
    train(resumed, 5, lock=again, optimizer=new_optimizer, first=5)
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_model_keeps_its_names_and_copies_and_saves_as_if_unlocked(model, tmp_path):
    names = list(model.state_dict())
    PatternLock.capture(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    clone = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], weight)
        assert not dict(clone.named_parameters())[name]._backward_hooks


@pytest.mark.parametrize(
    "make", [tiny_distilbert, tiny_roberta, tiny_mpnet, lambda: tiny_bert(BertForQuestionAnswering)]
)
def test_other_architectures(make):
    model = make_sparse(make())
    sparsity = PatternLock.capture(model).sparsity()
    assert sparsity["encoder"] == pytest.approx(0.7, abs=1e-3)
    assert sparsity["pooler"] is None
    assert len(sparsity["layers"]) == 12


def test_frozen_weights_are_locked_without_a_hook(model):
    for weight in prunable(model).values():
        weight.requires_grad = False
    lock = PatternLock.capture(model)
    train(model, 2, lock=lock)
    lock.verify()


def test_a_lock_of_another_model_is_refused(model):
    lock = PatternLock.capture(model)
    other = PatternLock.capture(make_sparse(tiny_bert(BertForSequenceClassification, intermediate_size=128)))
    with pytest.raises(InputError, match=r"pruning state: 256 bytes for bert\.encoder.*, wanted 512"):
        other.load_state_dict(lock.state_dict())
    with pytest.raises(InputError, match="pruning state: nothing for bert"):
        lock.load_state_dict({})


def test_a_model_without_zeros_gets_a_warning_of_one_line_and_a_sparse_one_none(model):
    with pytest.warns(
        UserWarning, match="BertForSequenceClassification has no zeros to keep: got 0 %.*wanted"
    ) as given:
        PatternLock.capture(tiny_bert(BertForSequenceClassification))
    assert len(given) == 1 and "\n" not in str(given[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PatternLock.capture(model)


class Around(torch.nn.Module):
    """A module that holds another one by a name of its own."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def sentence_transformer(model):
    return torch.nn.Sequential(Around(auto_model=model.bert), torch.nn.Identity())


class Lora(torch.nn.Module):
    """The layer that PEFT puts in the place of a Linear."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, linear.out_features, bias=False)})


def peft(model):
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = Lora(layer.attention.self.query)
    return Around(base_model=Around(model=model))


WRAPPERS = {
    "sentence-transformers": sentence_transformer,
    "cross-encoder": lambda model: torch.nn.Sequential(Around(model=model)),
    "peft": peft,
    "compile": torch.compile,
    "compiled inside": lambda model: Around(inner=torch.compile(model)),
    "own name": lambda model: Around(encoder_of_mine=model),
}


@pytest.mark.filterwarnings("ignore:.*have an adapter")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_encoder_is_found_inside_a_wrapper(model, wrap):
    expected = PatternLock.capture(model)
    wrapped = wrap(model)
    lock = PatternLock.capture(wrapped)
    assert {id(weight) for weight in lock.weights.values()} == {id(weight) for weight in expected.weights.values()}
    assert lock.weights.keys() <= dict(wrapped.named_parameters()).keys()
    assert lock.sparsity()["pooler"] == pytest.approx(0.7, abs=1e-2)
    assert lock.state_dict().keys() == expected.state_dict().keys()
    GradualPruner(wrapped, final=0.8, begin=0, end=2, stop=2, interval=1).step(2)
    assert PatternLock.capture(model).sparsity()["encoder"] == pytest.approx(0.8, abs=1e-2)


@pytest.mark.parametrize(
    "hold", [PatternLock.capture, lambda model: GradualPruner(model, final=0.8, begin=0, end=2, stop=2, interval=1)]
)
def test_adapters_are_warned_of(model, hold):
    with pytest.warns(UserWarning, match=r"2 pruned weights have an adapter, .*query\.base_layer\.weight"):
        hold(peft(model))


def test_two_encoders_are_refused(model):
    with pytest.raises(InputError, match=r"2 encoders \(query, document\), wanted one"):
        PatternLock.capture(Around(query=model, document=copy.deepcopy(model)))


def sharded(weight, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        return torch.distributed.tensor.distribute_tensor(weight, mesh)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["sharded", "on the meta device", "empty"])
def test_parameters_that_are_not_whole_are_refused(model, tmp_path, kind):
    lock = PatternLock.capture(model)
    dense = model.bert.encoder.layer[0].output.dense
    weight = dense.weight.detach()
    changed = {
        "sharded": lambda: sharded(weight, tmp_path),
        "on the meta device": lambda: weight.to("meta"),
        "empty": lambda: weight[:0],
    }
    dense.weight = torch.nn.Parameter(changed[kind]())
    message = rf"bert\.encoder\.layer\.0\.output\.dense\.weight: the parameter is {kind}, wanted a whole tensor"
    for refused in (
        lambda: PatternLock.capture(model),
        lambda: lock.on(model),
        lambda: GradualPruner(model, final=0.8, begin=0, end=2, stop=2, interval=1),
    ):
        with pytest.raises(InputError, match=message) as raised:
            refused()
        assert "\n" not in str(raised.value)
