"""quantization.json and quantization.safetensors: what is written is read, what is broken is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruneofa.errors import InputError
from pruneofa.formats import scales as quantization
from pruneofa.formats.scales import SCALES, SETTINGS, Quantization, QuantizationArgs, codes, read, write
from tests.golden import source
from tests.quantized import DYNAMIC, quantize_folder

QUERY = "encoder.layer.0.attention.self.query.weight"
KEY = "encoder.layer.0.attention.self.key.weight"
OUTPUT = "encoder.layer.0.output.dense.weight"
WORDS = "embeddings.word_embeddings.weight"
POOLER_WEIGHT = "pooler.dense.weight"


@pytest.fixture
def folder(tmp_path):
    made = source(tmp_path / "model")
    quantize_folder(made)
    return made


def refused(folder):
    with pytest.raises(InputError) as caught:
        read(folder)
    text = str(caught.value)
    assert text.startswith(str(folder)) and text.isascii() and "\n" not in text and len(text) < 700
    return text


def edit_scales(folder, edit):
    arrays = load_file(folder / SCALES)
    edit(arrays)
    save_file(arrays, folder / SCALES)


def edit_settings(folder, edit):
    settings = json.loads((folder / SETTINGS).read_text())
    edit(settings)
    (folder / SETTINGS).write_text(json.dumps(settings))


def same(a: Quantization, b: Quantization):
    assert (a.weights, a.input_activations, a.embeddings) == (b.weights, b.input_activations, b.embeddings)
    assert (a.input_scale, a.input_zero_point) == (b.input_scale, b.input_zero_point)
    assert (a.pattern_hash, a.pooler_hash) == (b.pattern_hash, b.pooler_hash)
    assert sorted(a.weight_scale) == sorted(b.weight_scale)
    for name, scale in a.weight_scale.items():
        np.testing.assert_array_equal(scale, b.weight_scale[name], strict=True)


# Round trips


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("embeddings", [True, False])
def test_what_is_written_is_read(tmp_path, strategy, static, embeddings):
    folder = source(tmp_path / "model")
    written = quantize_folder(folder, strategy=strategy, static=static, embeddings=embeddings)
    same(read(folder), written)
    assert read(folder).linears()[-1] == POOLER_WEIGHT
    assert all(type(zero) is int for zero in read(folder).input_zero_point.values())


def test_a_folder_without_scales(tmp_path):
    assert read(source(tmp_path / "model")) is None


def test_written_twice_is_the_same_bytes(folder):
    before = [(folder / name).read_bytes() for name in (SETTINGS, SCALES)]
    write(folder, read(folder))
    assert before == [(folder / name).read_bytes() for name in (SETTINGS, SCALES)]
    assert not list(folder.glob(".*"))


def test_names_are_those_of_compressed_tensors(folder):
    stored = load_file(folder / SCALES)
    layer = OUTPUT.removesuffix(".weight")
    assert {f"{layer}.{part}" for part in ("weight_scale", "input_scale", "input_zero_point")} <= set(stored)
    assert WORDS + "_scale" in stored
    assert json.loads((folder / SETTINGS).read_text())["input_activations"] == {
        "strategy": "tensor", "symmetric": False, "dynamic": False, "num_bits": 8, "type": "int",
    }  # fmt: skip


# Codes


@pytest.mark.parametrize("strategy, lowest", [("channel", -127), ("tensor", -128)])
def test_codes_are_recovered_exactly(strategy, lowest):
    random = np.random.default_rng(0)
    scale = np.exp(random.uniform(-60, 60, 500)).astype(np.float32)
    wanted = random.integers(lowest, 128, (500, 300)).astype(np.int8)
    found = codes("w", wanted * scale[:, None], scale, lowest)
    np.testing.assert_array_equal(found, wanted, strict=True)


def test_weights_off_the_grid_are_named():
    scale = np.ones(3, np.float32)
    weight = np.float32([[1, 2], [3, -128], [0, 127]])
    with pytest.raises(InputError, match=r"^a\.weight is not on the int8 grid: 1 of its weights"):
        codes("a.weight", weight, scale)
    assert codes("a.weight", weight, scale, -128)[1, 1] == -128
    for wrong in (1.5, 128, -0.0, np.nextafter(np.float32(1), np.float32(2))):
        weight[2, 0] = wrong
        with pytest.raises(InputError, match="is not on the int8 grid"):
            codes("a.weight", weight, scale, -128)


# What is refused


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf, 1e-40, 3e38])
def test_dead_activations_are_named(folder, value):
    edit_scales(folder, lambda arrays: arrays[OUTPUT.replace("weight", "input_scale")].fill(value))
    assert f"input scale of {OUTPUT} is " in (text := refused(folder)) and "constant or never observed" in text


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", [OUTPUT, WORDS])
def test_scales_of_weights_that_are_no_scales(folder, value, name):
    edit_scales(folder, lambda arrays: arrays[f"{name}_scale"].__setitem__(1, value))
    assert f"weight scale of {name} is {np.float32(value)} in row 1; wanted a number above 0" in refused(folder)


@pytest.mark.parametrize("zero", [-1, 256, 1.0, True, None])
def test_zero_points_that_are_no_codes(folder, zero):
    found = read(folder)
    with pytest.raises(InputError, match=f"input zero point of {OUTPUT} is {zero}; wanted an integer from 0 to 255"):
        dataclasses.replace(found, input_zero_point=found.input_zero_point | {OUTPUT: zero})


def test_a_scale_that_is_no_float32(folder):
    found = read(folder)
    with pytest.raises(InputError, match=f"input scale of {OUTPUT} is 0.1: "):
        dataclasses.replace(found, input_scale=found.input_scale | {OUTPUT: 0.1})


def test_query_key_and_value_share_an_input(folder):
    edit_scales(folder, lambda arrays: arrays[KEY.replace("weight", "input_zero_point")].fill(3))
    assert f"{QUERY} and {KEY} read the same input" in refused(folder)


@pytest.mark.parametrize("name", [QUERY, POOLER_WEIGHT, WORDS])
def test_missing_and_unexpected_weight_scales(folder, name):
    def drop(arrays):
        for part in ("weight_scale", "input_scale", "input_zero_point"):
            arrays.pop(name.replace("weight", part), None)

    whole = (folder / SCALES).read_bytes()
    edit_scales(folder, drop)
    assert f"no weight scale of {name}" in refused(folder)
    (folder / SCALES).write_bytes(whole)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if not key.endswith(name)}, folder / "model.safetensors")
    assert f"a weight scale of {name}, which the model does not have" in refused(folder)


@pytest.mark.parametrize("part", ["input_scale", "input_zero_point"])
def test_missing_and_unexpected_input_scales(folder, part):
    key = OUTPUT.replace("weight", part)
    whole = (folder / SCALES).read_bytes()
    edit_scales(folder, lambda arrays: arrays.pop(key))
    assert f"no {part.replace('_', ' ')} of {OUTPUT}" in refused(folder)
    (folder / SCALES).write_bytes(whole)
    dynamic = dataclasses.asdict(DYNAMIC)
    edit_settings(folder, lambda settings: settings.update(input_activations=dynamic))
    assert "unexpected input scale of encoder.layer.0" in refused(folder)


def test_scales_of_another_shape(folder):
    edit_scales(folder, lambda arrays: arrays.update({f"{OUTPUT}_scale": np.ones(3, np.float32)}))
    assert f"3 weight scales of {OUTPUT}; wanted 4, its rows" in refused(folder)


@pytest.mark.parametrize(
    "name, array",
    [
        (f"{OUTPUT}_scale", np.ones(4, np.float64)),
        (OUTPUT.replace("weight", "input_scale"), np.ones(2, np.float32)),
        (OUTPUT.replace("weight", "input_zero_point"), np.ones(1, np.int32)),
    ],
)
def test_scales_of_another_type(folder, name, array):
    edit_scales(folder, lambda arrays: arrays.update({name: array}))
    assert f"{name} is " in (text := refused(folder)) and "wanted" in text


@pytest.mark.parametrize("name", ["junk", "encoder.layer.0.output.dense.bias", f"{QUERY}.offset"])
def test_unknown_tensors(folder, name):
    edit_scales(folder, lambda arrays: arrays.update({name: np.ones(1, np.float32)}))
    assert f"'{name}' is unknown" in refused(folder)


def test_scales_of_what_is_not_quantized(folder):
    edit_scales(folder, lambda arrays: arrays.update({"classifier.weight_scale": np.ones(2, np.float32)}))
    assert "a weight scale of 'classifier.weight', which is not quantized" in refused(folder)
    edit_scales(folder, lambda arrays: arrays.pop("classifier.weight_scale"))
    edit_settings(folder, lambda settings: settings.update(embeddings=None))
    assert "a weight scale of 'embeddings.position_embeddings.weight', which is not" in refused(folder)


def test_one_scale_per_tensor_is_one(folder):
    edit_settings(folder, lambda settings: settings["weights"].update(strategy="tensor"))
    assert "differs from row to row; wanted one per tensor" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"version": 2}, {"version": True}, {"junk": 1}, {"weights": None}, {"weights": {}},
        {"pattern_hash": 3}, {"pattern_hash": "abc"}, {"embeddings": []}, {"input_activations": "int8"},
        {"pooler_hash": 3}, {"pooler_hash": "abc"},
        {"weights": {"strategy": "group", "symmetric": True, "dynamic": False, "num_bits": 8, "type": "int"}},
        {"weights": {"strategy": "channel", "symmetric": True, "dynamic": False, "num_bits": 4, "type": "int"}},
        {"weights": {"strategy": "channel", "symmetric": 1, "dynamic": False, "num_bits": 8, "type": "int"}},
        {"embeddings": {"strategy": "tensor", "symmetric": True, "dynamic": False, "num_bits": 8, "type": "int"}},
        {"input_activations": {**dataclasses.asdict(DYNAMIC), "strategy": "tensor"}},
    ],
)  # fmt: skip
def test_other_settings(folder, change):
    edit_settings(folder, lambda settings: settings.update(change))
    assert next(iter(change)) in refused(folder)


@pytest.mark.parametrize("key", ["format", "version", "weights", "input_activations", "embeddings", "pattern_hash"])
def test_missing_settings(folder, key):
    edit_settings(folder, lambda settings: settings.pop(key))
    assert key in refused(folder)


def test_damaged_files(folder):
    whole = (folder / SCALES).read_bytes()
    (folder / SCALES).write_bytes(whole[:-3])
    assert "not a complete safetensors file" in refused(folder)
    (folder / SCALES).unlink()
    assert f"{SCALES} is missing" in refused(folder)
    for text in ("", "{", "[]", '{"a": 1, "a": 2}', "NaN"):
        (folder / SETTINGS).write_text(text)
        assert refused(folder).endswith("quantize the model again with: pruneofa quantize")
    (folder / SETTINGS).unlink()
    (folder / SETTINGS).mkdir()
    text = refused(folder)
    assert "cannot be read" in text and text.endswith("quantize the model again with: pruneofa quantize")


def test_a_changed_pattern(folder):
    found = read(folder)
    quantization.check_pattern(folder, found, found.pattern_hash, found.pooler_hash)
    for part, hashes in (("encoder", ("0" * 64, found.pooler_hash)), ("pooler", (found.pattern_hash, "0" * 64))):
        with pytest.raises(InputError, match=f"the {part}'s sparsity pattern .* lock was broken after quantization"):
            quantization.check_pattern(folder, found, *hashes)
    unknown = dataclasses.replace(found, pattern_hash=None, pooler_hash=None)
    quantization.check_pattern(folder, unknown, "0" * 64, "0" * 64)


def test_a_quantization_of_nothing():
    args = QuantizationArgs("channel", True)
    with pytest.raises(InputError, match="no weight scale of an encoder's linear layer"):
        Quantization(args, DYNAMIC, args, {}, {}, {})
