"""What was packed comes back: every bit in fp32, every zero in int8."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from pruneofa import families
from pruneofa.formats import pattern
from pruneofa.formats.convert import convert, pack_linear, quantize_weight
from pruneofa.formats.files import read_json_list, write_json
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import read
from pruneofa.formats.pattern import pattern_hashes, pattern_holds, pattern_of
from pruneofa.formats.unpack import unpack
from pruneofa.formats.verify import verify
from tests.golden import LAYER, source, tensors

QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "F64": "<f8", "I8": "i1"}


def bf16(array):
    """The upper halves of float32 numbers that need no more."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2")


def save(file, arrays):
    """A safetensors file of {name: (dtype name, array)}, bfloat16 as uint16."""
    entries, end = {}, 0
    for name, (dtype, array) in arrays.items():
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    head = json.dumps(entries).encode()
    data = b"".join(np.asarray(array, DTYPES[dtype]).tobytes() for dtype, array in arrays.values())
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def load(file):
    """{name: (dtype name, shape, bytes)}, without a library that would not know bfloat16."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    assert entries.pop("__metadata__", {"format": "pt"}) == {"format": "pt"}
    spans = {name: slice(*(start + place for place in entry["data_offsets"])) for name, entry in entries.items()}
    return {name: (entries[name]["dtype"], entries[name]["shape"], raw[spans[name]]) for name in entries}


shapes = st.tuples(st.integers(1, 9), st.integers(1, 27))
numbers = st.one_of(st.sampled_from([0.0, -0.0]), st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(hnp.arrays(np.float32, shapes, elements=numbers, fill=st.just(np.float32(0))))
def test_any_weight_comes_back_bit_for_bit(weight):
    linear = pack_linear(weight, "fp32")
    assert linear.dense().tobytes() == weight.tobytes()
    assert linear.bitmask.shape == (weight.shape[0], -(-weight.shape[1] // 8))
    assert (linear.negative_zeros is not None) == bool((np.signbit(weight) & (weight == 0)).any())
    assert pattern_hashes([(QUERY, linear.shape, linear.pattern_bits)])[0] == pattern.pattern_hash({QUERY: weight != 0})
    assert pattern_holds(linear.kept, pattern_of(linear.kept))


@given(hnp.arrays(np.float32, shapes, elements=numbers, fill=st.just(np.float32(0))))
def test_any_weight_as_int8_keeps_its_pattern_and_is_near(weight):
    linear = pack_linear(weight, "int8")
    np.testing.assert_array_equal(linear.kept, weight != 0)
    assert linear.values.dtype == np.int8 and linear.scale.dtype == np.float32 and linear.negative_zeros is None
    assert (linear.scale > 0).all() and (linear.scale[(weight == 0).all(1)] == 1).all()
    # Half a step; where float32 ends the scale is a multiple of 2^-149, or a step less than it should be.
    error = np.abs(linear.dense().astype(np.float64) - weight)
    assert (error <= linear.scale[:, None] * 0.51 + 127 * 2.0**-149).all()
    again = pack_linear(linear.dense(), "int8")
    assert (again.kept <= linear.kept).all()


def test_int8_is_computed_as_the_specification_says():
    weight = np.float32(
        [[1, -0.25, 0.003, 0], [0, 0, 0, 0], [-2, 1.5, 2, 1e-30], [2**-149, 0, 0, 0], [3e38, -3e38, 1, 0]]
    )
    values, scale = quantize_weight(weight)
    np.testing.assert_array_equal(
        values, [[127, -32, 0, 0], [0, 0, 0, 0], [-127, 95, 127, 0], [1, 0, 0, 0], [127, -127, 0, 0]]
    )
    np.testing.assert_array_equal(
        scale, np.float32([1 / 127, 1, np.float32(2) / np.float32(127), 2**-149, np.float32(3e38) / np.float32(127)])
    )
    linear = pack_linear(weight, "int8")
    assert linear.values.tolist() == [127, -32, 0, -127, 95, 127, 0, 1, 127, -127, 0]  # three of them stored zeros


@pytest.mark.parametrize("compress", [False, True])
def test_every_bit_of_a_folder_comes_back(compress, tmp_path):
    """Three dtypes, -0.0, old names, wrapped names, a tied decoder, several files; integer buffers are made anew."""
    folder = source(tmp_path / "model")
    arrays = {}
    for number, (name, weight) in enumerate(tensors().items()):
        dtype = ("F32", "F16", "BF16")[number % 3]
        arrays[name] = dtype, bf16(weight) if dtype == "BF16" else weight.astype(DTYPES[dtype])
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        arrays[f"bert.embeddings.LayerNorm.{old}"] = arrays.pop(f"bert.embeddings.LayerNorm.{new}")
    arrays["cls.predictions.decoder.weight"] = arrays["bert." + WORDS]
    arrays["module.cls.predictions.bias"] = "F32", np.float32([-0.0, 1, 2])
    arrays["scalar"] = "F16", np.asarray(0.5, "<f2")
    first = dict(list(arrays.items())[:10])
    rest = {name: array for name, array in arrays.items() if name not in first}
    buffer = {"bert.embeddings.position_ids": ("I64", np.arange(6)[None])}
    (folder / "model.safetensors").unlink()
    save(folder / "model-1.safetensors", first)
    save(folder / "model-2.safetensors", rest | buffer)
    places = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys([*rest, *buffer], "model-2.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})

    manifest = pack(folder, tmp_path / "packed", precision="fp32", compress=compress).to_json()
    assert manifest["tensors"]["cls.predictions.decoder.weight"] == {
        "shape": [7, 4], "kind": "tied", "dtype": arrays["bert." + WORDS][0], "to": WORDS,
    }  # fmt: skip
    assert manifest["tensors"]["embeddings.LayerNorm.weight"]["stored_as"] == "bert.embeddings.LayerNorm.gamma"
    assert manifest["tensors"]["cls.predictions.bias"]["stored_as"] == "module.cls.predictions.bias"
    assert "stored_as" not in manifest["tensors"][QUERY]
    unpack(tmp_path / "packed", tmp_path / "again")
    assert load(tmp_path / "again" / "model.safetensors") == {
        name: (dtype, list(array.shape), array.tobytes()) for name, (dtype, array) in arrays.items()
    }
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.usefixtures("parts")
def test_int8_comes_back_in_the_dtypes_of_the_source(model, tmp_path):
    largest = np.full((4, 4), 65504, "<f2")
    near = bf16(np.float32(1 + 2**-7) * np.ones((4, 4), np.float32))
    save(
        model / "model.safetensors", {f"bert.{QUERY}": ("F16", largest), LAYER + "output.dense.weight": ("BF16", near)}
    )
    pack(model, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    found = load(tmp_path / "again" / "model.safetensors")
    assert found[f"bert.{QUERY}"] == ("F16", [4, 4], largest.tobytes())
    assert found[LAYER + "output.dense.weight"] == ("BF16", [4, 4], near.tobytes())
    assert verify(model, tmp_path / "again")["ok"]


def test_a_decoder_that_is_not_tied_is_stored(model, tmp_path):
    weights = tensors()
    decoder = weights["bert." + WORDS].copy()
    decoder[2, 0] += 0.25
    save_file(weights | {"cls.predictions.decoder.weight": decoder}, model / "model.safetensors")
    packed = convert(model, "fp32")
    np.testing.assert_array_equal(packed.plain["cls.predictions.decoder.weight"], decoder)


@pytest.mark.usefixtures("parts")
def test_a_model_without_prefix_and_without_pooler(model, tmp_path):
    weights = {families.base_name(n): w for n, w in tensors().items() if "pooler" not in n}
    weights[QUERY][:] = 0  # nothing kept at all
    save_file(weights, model / "model.safetensors")
    manifest = pack(model, tmp_path / "packed").to_json()
    assert manifest["prefix"] == "" and manifest["pooler_hash"] is None and manifest["tensors"][QUERY]["nonzeros"] == 0
    assert not read(tmp_path / "packed").linears[QUERY].dense().any()


def test_sentence_transformers_folders_keep_how_they_pool(model, tmp_path):
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)
    ]
    write_json(model / "modules.json", modules)
    write_json(model / "sentence_bert_config.json", {"max_seq_length": 6})
    write_json(model / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    (model / "1_Pooling" / "model.safetensors").write_bytes(b"not ours")
    (model / "2_Normalize").mkdir()
    pack(model, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    for folder in (tmp_path / "packed", tmp_path / "again"):
        assert read_json_list(folder / "modules.json") == modules
        assert [path.name for path in (folder / "1_Pooling").iterdir()] == ["config.json"]
        assert (folder / "2_Normalize").is_dir() and (folder / "sentence_bert_config.json").is_file()
    assert not list((tmp_path / "packed").rglob("model.safetensors"))
