"""Packing folders that bring their scales: the codes are those of training, and unpacking gives the folder back."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats import scales as quantization
from pruneofa.formats.convert import convert
from pruneofa.formats.files import read_json
from pruneofa.formats.manifest import MANIFEST, TENSORS
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import PackedLinear, read
from pruneofa.formats.scales import SCALES, SETTINGS
from pruneofa.formats.unpack import unpack
from tests.broken import OUTPUT, QUERY, WORDS, WRONG, copy, paths, put, refused, replaced, write
from tests.golden import STATIC, source
from tests.quantized import quantize_folder


@pytest.fixture(params=["channel", "tensor"])
def strategy(request):
    return request.param


@pytest.fixture
def folder(tmp_path, strategy):
    made = source(tmp_path / "model")
    quantize_folder(made, strategy=strategy)
    return made


@pytest.fixture
def static(tmp_path):
    return copy(STATIC, tmp_path)


def edit_weight(folder, name, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[f"bert.{name}"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def same_files(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    for name in names:
        if name == MANIFEST:
            assert read_json(a / name) == read_json(b / name)
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_codes_and_scales_are_those_of_training(folder):
    known = quantization.read(folder)
    packed = convert(folder)
    weights = load_file(folder / "model.safetensors")
    assert packed.linears.keys() | packed.embeddings.keys() == known.weight_scale.keys()
    for name, linear in packed.linears.items():
        np.testing.assert_array_equal(linear.scale, known.weight_scale[name], strict=True)
        np.testing.assert_array_equal(linear.dense().view(np.uint32), weights[f"bert.{name}"].view(np.uint32))
        assert linear.values.all()
    for name, table in packed.embeddings.items():
        np.testing.assert_array_equal(table.rows(slice(None)), weights[f"bert.{name}"], strict=True)
    assert packed.input_scales == {
        name: (known.input_scale[name], known.input_zero_point[name]) for name in known.linears()
    }


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("compress", [True, False])
def test_unpacking_gives_the_folder_back_and_packing_the_same_bytes(strategy, static, compress, tmp_path):
    folder = source(tmp_path / "model")
    quantize_folder(folder, strategy=strategy, static=static)
    pack(folder, tmp_path / "packed", compress=compress)
    unpack(tmp_path / "packed", tmp_path / "again")
    weights, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert {name: w.tobytes() for name, w in weights.items()} == {name: w.tobytes() for name, w in again.items()}
    for name in (SETTINGS, SCALES):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    pack(tmp_path / "again", tmp_path / "packed again", compress=compress)
    same_files(tmp_path / "packed", tmp_path / "packed again")


def test_scales_of_dynamic_folders_are_kept_too(tmp_path, strategy):
    folder = source(tmp_path / "model")
    known = quantize_folder(folder, static=False, strategy=strategy)
    manifest = pack(folder, tmp_path / "packed").to_json()
    assert manifest["activations"] == {"kind": "dynamic"}
    for name, linear in read(tmp_path / "packed").linears.items():
        np.testing.assert_array_equal(linear.scale, known.weight_scale[name])


def test_tables_that_packing_quantized_are_unpacked_with_their_scales(tmp_path):
    quantize_folder(source(tmp_path / "model"), static=False, embeddings=False)
    pack(tmp_path / "model", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert WORDS in quantization.read(tmp_path / "again").weight_scale
    pack(tmp_path / "again", tmp_path / "packed again")
    assert (tmp_path / "packed" / TENSORS).read_bytes() == (tmp_path / "packed again" / TENSORS).read_bytes()


def test_weights_that_packing_quantized_are_unpacked_without_scales(tmp_path):
    assert not pack(source(tmp_path / "model"), tmp_path / "packed").quantized
    unpack(tmp_path / "packed", tmp_path / "again")
    assert not quantization.is_quantized(tmp_path / "again")


@pytest.mark.parametrize(("variant", "value"), [("v1-int8", False), ("v1-int8", 1), ("v1-fp32", True), (STATIC, True)])
def test_quantized_says_nothing_else(variant, value, tmp_path):
    folder = copy(variant, tmp_path)
    write(folder, read_json(folder / MANIFEST) | {"quantized": value})
    assert f"{MANIFEST}: quantized is {value}; wanted true, only for int8 with dynamic activations" in refused(folder)


def test_tables_without_scales_are_quantized_by_packing(tmp_path):
    folder = source(tmp_path / "model")
    quantize_folder(folder, embeddings=False)
    wanted = convert(source(tmp_path / "plain")).embeddings
    for name, table in convert(folder).embeddings.items():
        np.testing.assert_array_equal(table.values, wanted[name].values)


def test_as_fp32_a_quantized_folder_is_its_plain_weights(folder, tmp_path):
    manifest = pack(folder, tmp_path / "packed", precision="fp32").to_json()
    assert manifest["activations"] == {"kind": "dynamic"}
    unpack(tmp_path / "packed", tmp_path / "again")
    assert not (tmp_path / "again" / SETTINGS).exists()
    weights, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert {name: w.tobytes() for name, w in weights.items()} == {name: w.tobytes() for name, w in again.items()}


def test_minus_128_is_a_code_of_a_linear_with_one_scale(tmp_path):
    folder = source(tmp_path / "model")
    quantize_folder(folder, strategy="tensor")
    assert convert(folder).linears[QUERY].values.min() == -128
    settings = read_json(folder / SETTINGS)
    settings["weights"]["strategy"] = "channel"
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"is not on the int8 grid"):
        convert(folder)


@pytest.mark.parametrize("name", [QUERY, WORDS])
def test_weights_trained_after_quantization_are_found(folder, name, tmp_path):
    edit_weight(folder, name, lambda weight: weight.__imul__(np.float32(1.001)))
    with pytest.raises(InputError, match=f"model: {name} is not on the int8 grid: "):
        pack(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_pattern_that_changed_after_quantization_is_found(folder, tmp_path):
    edit_weight(folder, QUERY, lambda weight: weight.__setitem__(weight != 0, 0))
    for precision in ("int8", "fp32"):
        with pytest.raises(InputError, match="pattern lock was broken"):
            pack(folder, tmp_path / "packed", precision=precision)


def test_a_pooler_zero_that_was_revived_is_found(folder, tmp_path):
    scale = quantization.read(folder).weight_scale[POOLER_WEIGHT]

    def revive(weight):
        row, column = np.argwhere(weight == 0)[0]
        weight[row, column] = scale[row]  # code 1: still on the grid

    edit_weight(folder, POOLER_WEIGHT, revive)
    for precision in ("int8", "fp32"):
        with pytest.raises(InputError, match="the pooler's sparsity pattern has hash .*: its pattern lock"):
            pack(folder, tmp_path / "packed", precision=precision)


def test_broken_scales_are_found_by_packing(folder, tmp_path):
    (folder / SCALES).unlink()
    with pytest.raises(InputError, match=f"{SCALES} is missing"):
        pack(folder, tmp_path / "packed")


# The manifest


def test_every_static_scale_removed_or_of_another_kind(static):
    manifest = read_json(static / MANIFEST)
    fields = [path for path in paths(manifest) if path[:2] == ("activations", "scales")]
    assert len(fields) == 1 + 7 * 3
    accepted = set()
    for path in fields:
        for value in WRONG:
            write(static, replaced(manifest, path, value))
            try:
                read(static)
            except InputError as error:
                assert str(static) in str(error) and str(error).isascii() and len(str(error)) < 700
            else:
                accepted.add((path[-1], value))
    assert accepted == {(0, 2.5), (1, 0)}  # a scale and a zero point, where no other layer has to have them too


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((QUERY,), [0.5, 7], f"{QUERY} and {QUERY.replace('query', 'key')} read the same input but have"),
        ((OUTPUT, 0), 0.0, f"input scale of {OUTPUT} is 0.0: its activations were constant or never observed"),
        ((OUTPUT, 0), 0.1, f"input scale of {OUTPUT} is 0.1: "),
        ((OUTPUT, 0), 1, f"input scale of {OUTPUT} is 1: "),
        ((OUTPUT, 1), 256, f"input zero point of {OUTPUT} is 256"),
        (("pooler.dense.weight",), None, "pooler.dense.weight is None; wanted [scale, zero point]"),
        (("classifier.weight",), [1.0, 0], "a scale for 'classifier.weight'; wanted one for every linear weight"),
    ],
)
def test_static_scales_that_cannot_be(path, value, message, static):
    write(static, replaced(read_json(static / MANIFEST), ("activations", "scales", *path), value))
    assert f"{MANIFEST}: activations: {message}" in refused(static)


def test_static_scales_of_floats_are_refused(tmp_path):
    scales = read_json(copy(STATIC, tmp_path) / MANIFEST)["activations"]
    fp32 = copy("v1-fp32", tmp_path)
    write(fp32, read_json(fp32 / MANIFEST) | {"activations": scales})
    assert "activations is" in refused(fp32)


def test_minus_128_needs_a_smaller_largest_scale(static):
    bits, values = np.uint8([[1]]), np.int8([-128])
    largest = np.finfo(np.float32).max / np.float32(128)
    assert np.isfinite(PackedLinear((1, 4), bits, values, np.float32([largest])).dense()).all()
    with pytest.raises(InputError, match="at most 2.65"):
        PackedLinear((1, 4), bits, values, np.float32([np.nextafter(largest, np.float32(np.inf))]))
    put(static, f"{QUERY}.scale", lambda scale: scale.fill(2.66e36))
    assert f"{TENSORS}: {QUERY}: scale contains a number that is not above 0 and at most 2.65" in refused(static)
