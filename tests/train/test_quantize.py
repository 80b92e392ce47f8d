import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    MPNetForSequenceClassification,
    RobertaForSequenceClassification,
)

from pruneofa.errors import InputError
from pruneofa.formats import scales as quantization
from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.quantize import EMA, FakeQuantizer, input_name
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta

OUTPUT = "encoder.layer.0.output.dense"


def make_sparse(model, sparsity=0.7):
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.mul_(50 / weight.shape[1] ** 0.5)  # so that ranges differ from input to input
            weight.masked_fill_(~magnitude_mask(weight, sparsity), 0.0)
    return model


@pytest.fixture
def model():
    return make_sparse(without_dropout())


def without_dropout(**config):
    config |= {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_bert(BertForSequenceClassification, **config)


def batch(model, seed=0, length=8):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (4, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def train(model, steps, quantizer=None, *, first=0, optimizer=None, bf16=False):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    lock = PatternLock.capture(model)
    model.train()
    for step in range(first, first + steps):
        optimizer.zero_grad()
        labels = torch.tensor([0, 1, 0, 1])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch(model, step), labels=labels).loss
        loss.backward()
        optimizer.step()
        lock.apply()
    lock.release()
    return optimizer


SETTINGS = [
    {},
    {"activations": "dynamic"},
    {"weights": "tensor"},
    {"weights": "tensor", "activations": "dynamic", "embeddings": False},
]
MODELS = {
    "bert": lambda: tiny_bert(BertForSequenceClassification, num_labels=2),
    "qa": lambda: tiny_bert(BertForQuestionAnswering),
    "distilbert": lambda: tiny_distilbert(DistilBertForSequenceClassification, num_labels=2),
    "roberta": lambda: tiny_roberta(RobertaForSequenceClassification, num_labels=2),
    "mpnet": lambda: tiny_mpnet(MPNetForSequenceClassification, num_labels=2),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "default")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_folder_computes_what_was_simulated(make, settings, tmp_path):
    model = make_sparse(make())
    names = list(model.state_dict())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    pruned = {name: weight.detach() == 0 for name, weight in prunable(model).items()}
    quantizer = FakeQuantizer(model, **settings)
    quantizer.calibrate([batch(model, seed) for seed in range(3)])
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    free = logits(model, batch(model))
    folded = quantizer.fold()
    simulated = logits(model, batch(model))
    torch.testing.assert_close(simulated, free, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names

    model.save_pretrained(tmp_path)
    quantization.write(tmp_path, folded)
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    scales = quantization.read(tmp_path)
    again = FakeQuantizer.of(plain, scales)
    assert torch.equal(logits(plain, batch(plain)), simulated)
    again.release()
    assert not torch.equal(logits(plain, batch(plain)), simulated)
    for name, weight in prunable(plain).items():
        assert (weight[pruned[name]] == 0).all() and not (weight.signbit() & (weight == 0)).any()
    for name, weight in plain.named_parameters():
        canonical = name.partition(".")[2]
        if canonical in scales.weight_scale:
            quantization.codes(name, weight.detach().numpy(), scales.weight_scale[canonical], scales.lowest)
        else:
            assert torch.equal(weight, before[name]), name


def test_folding_twice_changes_nothing(model):
    quantizer = FakeQuantizer(model)
    quantizer.calibrate([batch(model)])
    first = quantizer.fold()
    weights = copy.deepcopy(model.state_dict())
    second = quantizer.fold()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert first.input_scale == second.input_scale and first.pattern_hash == second.pattern_hash
    assert all(np.array_equal(first.weight_scale[name], second.weight_scale[name]) for name in first.weight_scale)


def test_a_linear_of_a_batch_equals_numpy(model):
    quantizer = FakeQuantizer(model)
    quantizer.calibrate([batch(model)])
    folded = quantizer.fold()
    seen = {}
    layer = model.bert.encoder.layer[0].output.dense
    layer.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    logits(model, batch(model))
    name = f"{OUTPUT}.weight"
    scale, zero = np.float32(folded.input_scale[name]), folded.input_zero_point[name]
    x = seen["x"].numpy().reshape(-1, layer.in_features)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64) - zero
    weight = np.rint(layer.weight.detach().numpy() / folded.weight_scale[name][:, None]).astype(np.int64)
    y = (codes @ weight.T).astype(np.float32) * (scale * folded.weight_scale[name]) + layer.bias.detach().numpy()
    np.testing.assert_array_equal(seen["y"].numpy().reshape(y.shape), y)


def test_observers_average_what_is_no_padding_and_query_key_value_share_one(model):
    quantizer = FakeQuantizer(model)
    inputs = {}
    for name, module in quantizer.linears.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    model.train()
    batches = [batch(model, seed) for seed in range(3)]
    for each in batches:
        model(**each)
    model.eval()
    model(**batch(model, 7))  # moves nothing
    quantizer.observing = False
    model.train()(**batch(model, 8))  # nor does this
    for name in quantizer.linears:
        expected = None
        for x, each in zip(inputs[name], batches, strict=False):
            real = x if x.ndim == 2 else x[each["attention_mask"].bool()]
            found = torch.stack([real.min(), real.max()])
            expected = found if expected is None else expected + EMA * (found - expected)
        torch.testing.assert_close(quantizer.ranges[input_name(name)], expected.detach(), rtol=1e-5, atol=1e-6)
    shared = {input_name(f"encoder.layer.0.attention.self.{which}.weight") for which in ("query", "key", "value")}
    assert shared == {"encoder.layer.0.attention.input"} and len(quantizer.ranges) == 2 * 4 + 1


def test_padding_changes_nothing(model):
    quantizer = FakeQuantizer(model)
    short = batch(model, length=8)
    short["attention_mask"][:] = 1
    quantizer.calibrate([short])
    ranges = copy.deepcopy(quantizer.ranges)
    padded = {name: torch.nn.functional.pad(value, (0, 8)) for name, value in short.items()}
    quantizer.calibrate([padded])
    for name, found in quantizer.ranges.items():
        torch.testing.assert_close(found, ranges[name], rtol=1e-5, atol=1e-6)
    quantizer.fold()
    torch.testing.assert_close(logits(model, padded), logits(model, short), rtol=1e-4, atol=1e-4)


def test_a_mask_that_is_passed_by_position_counts_too(model):
    inputs, found = batch(model), []
    for given, named in [((), inputs), ((inputs["input_ids"], inputs["attention_mask"]), {})]:
        quantizer = FakeQuantizer(model)
        model.train()(*given, **named)
        found.append(quantizer.ranges)
        quantizer.release()
    assert found[0].keys() == found[1].keys() != set()
    for name, ranges in found[0].items():
        torch.testing.assert_close(found[1][name], ranges)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_through_int8_keeps_every_zero_and_lowers_the_loss(model, settings, bf16):
    pruned = {name: weight.detach() == 0 for name, weight in prunable(model).items()}
    quantizer = FakeQuantizer(model, **settings)
    labels = torch.tensor([0, 1, 0, 1])

    def loss():
        with torch.no_grad():
            return sum(model.eval()(**batch(model, seed), labels=labels).loss.item() for seed in range(4))

    model.train()(**batch(model))
    before = loss()
    train(model, 12, quantizer, bf16=bf16)
    assert loss() < before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    quantizer.fold()
    for name, weight in prunable(model).items():
        assert (weight[pruned[name]] == 0).all()


def test_bf16_trains_on_nearly_the_gradients_of_float32(model):
    quantizer = FakeQuantizer(model)
    quantizer.calibrate([batch(model, seed) for seed in range(3)])
    quantizer.observing = False
    gradients = []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.train()(**batch(model), labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.97


def test_resuming_gives_the_same_bits(model, tmp_path):
    straight = copy.deepcopy(model)
    whole = FakeQuantizer(straight)
    train(straight, 8, whole)

    first = FakeQuantizer(model)
    optimizer = train(model, 4, first)
    save_file(first.state_dict(), tmp_path / "observers.safetensors")
    resumed = without_dropout(seed=1)
    resumed.load_state_dict(model.state_dict())
    second = FakeQuantizer(resumed)
    second.load_state_dict(load_file(tmp_path / "observers.safetensors"))
    again = torch.optim.AdamW(resumed.parameters(), lr=3e-3)
    again.load_state_dict(optimizer.state_dict())
    train(resumed, 4, second, first=4, optimizer=again)
    assert all(torch.equal(value, second.ranges[name]) for name, value in whole.ranges.items())
    assert whole.fold().input_scale == second.fold().input_scale
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_observer_state_of_another_model_is_refused(model):
    quantizer = FakeQuantizer(model)
    model.train()(**batch(model))
    state = quantizer.state_dict()
    del state[f"{OUTPUT}.input"]
    with pytest.raises(InputError, match=r"observer state: encoder\.layer\.0\.output\.dense\.input is missing"):
        quantizer.load_state_dict(state)


def test_percentiles_leave_the_tails_out(model):
    name = "encoder.layer.0.attention.output.dense"
    quantizer = FakeQuantizer(model)
    data = [batch(model, seed, length=32) for seed in range(8)]
    seen = []
    hook = quantizer.linears[f"{name}.weight"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    quantizer.calibrate(data)
    hook.remove()
    real = torch.cat([x[each["attention_mask"].bool()] for x, each in zip(seen, data, strict=True)])
    least, greatest = quantizer.ranges[f"{name}.input"]
    assert (least, greatest) == (real.min(), real.max())
    quantizer.calibrate(data, percentile=99.0)
    low, high = quantizer.ranges[f"{name}.input"]
    step = (greatest - least) / 2048
    assert least < low < high < greatest
    assert abs(low - real.quantile(0.01)) <= 2 * step and abs(high - real.quantile(0.99)) <= 2 * step


@pytest.mark.parametrize(("value", "said"), [(0.0, "0.0 to 0.0"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_ranges_that_fit_no_scale_name_the_layer(model, value, said):
    quantizer = FakeQuantizer(model)
    quantizer.calibrate([batch(model)])
    quantizer.ranges[f"{OUTPUT}.input"] = torch.tensor([0.0 if value == 0 else -1.0, value])
    with pytest.raises(InputError, match=rf"{OUTPUT}\.weight: its activations range from .*{said}"):
        quantizer.fold()


def test_dead_activations_are_found_by_calibration(model):
    with torch.no_grad():
        dense = model.bert.encoder.layer[0].intermediate.dense
        dense.weight.zero_()
        dense.bias.zero_()
    quantizer = FakeQuantizer(model)
    quantizer.calibrate([batch(model)], percentile=None)
    with pytest.raises(InputError, match=rf"{OUTPUT}\.weight: its activations range from 0\.0 to 0\.0, wanted"):
        quantizer.fold()
    train(model, 1, quantizer)  # training goes on all the same
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_without_ranges_nothing_is_computed(model):
    quantizer = FakeQuantizer(model)
    with pytest.raises(InputError, match="no range of its activations is known"):
        logits(model, batch(model))
    with pytest.raises(InputError, match="never observed"):
        quantizer.fold()


def test_a_folder_that_only_claims_to_be_on_the_grid_is_refused(model):
    quantizer = FakeQuantizer(model)
    quantizer.calibrate([batch(model)])
    folded = quantizer.fold()
    quantizer.release()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-4
    with pytest.raises(InputError, match=rf"{OUTPUT}\.weight is not on the int8 grid: 1 of"):
        FakeQuantizer.of(model, folded)


def test_names_copies_and_files_are_as_without_it(model, tmp_path):
    expected = logits(model, batch(model))
    quantizer = FakeQuantizer(model)
    model.train()(**batch(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path), batch(model)), expected)
    assert "quant" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    quantizer.release()
    assert torch.equal(logits(model, batch(model)), expected)
    assert not any("forward" in module.__dict__ for module in model.modules())
