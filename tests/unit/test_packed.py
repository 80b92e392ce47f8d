"""The packed folder: what is written is what FORMAT.md says, and comes back."""

import hashlib
import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.convert import convert, pack_linear, quantize_weight
from pruneofa.formats.files import read_json, read_json_list, write_json
from pruneofa.formats.layout import header, layout
from pruneofa.formats.manifest import COMPRESSED, MANIFEST, METADATA, TENSORS, Tensor
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import Packed, inspect, read, unpack_bits
from pruneofa.formats.pattern import pattern_hashes, pattern_holds, pattern_of
from pruneofa.formats.unpack import unpack
from tests.golden import CONFIG, GOLDEN, LAYER, STATIC, VARIANTS, source, tensors

QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"
FORMAT = Path(__file__).parents[2] / "FORMAT.md"
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "F64": "<f8", "I8": "i1"}


@pytest.fixture
def model(tmp_path):
    return source(tmp_path / "model")


@pytest.fixture
def parts(monkeypatch):
    """Tensors that make no whole model may be packed, where the format is what matters."""
    monkeypatch.setattr("pruneofa.formats.pack.check_tensors", lambda *_, **__: None)


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


def gaussian(rng, rows, columns, sparsity=0.9):
    weight = rng.standard_normal((rows, columns), np.float32)
    weight[np.abs(weight) < np.quantile(np.abs(weight), sparsity)] = 0
    return weight


# What is written


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_folders_of_every_version_still_load(variant):
    packed = read(GOLDEN / variant)
    expected = {families.base_name(name): weight for name, weight in tensors().items()}
    assert isinstance(packed, Packed) and packed.config == CONFIG
    int8 = packed.precision == "int8"
    assert len(packed.linears) == 7 and len(packed.embeddings) == 3
    assert {*packed.linears, *packed.embeddings, *packed.plain} == set(expected)
    for name, linear in packed.linears.items():
        np.testing.assert_array_equal(linear.kept, expected[name] != 0)
        assert linear.kept.any() and not linear.kept[1].any()
        axis = None if variant == STATIC else 1  # one scale per tensor, or per row
        scale = np.abs(expected[name]).max(axis, keepdims=True) / 127 if int8 else np.float32(0)
        assert (np.abs(linear.dense() - expected[name]) <= scale * 0.5001).all()
    for name, table in packed.embeddings.items():
        ids = np.array([[0, 1], [1, 1]])
        scale = np.abs(expected[name]).max() / 127 if int8 else 0
        assert table.rows(ids).shape == (2, 2, 4) and table.rows(ids).dtype == np.float32
        assert (np.abs(table.rows(ids) - expected[name][ids]) <= scale * 0.5001).all()
    for name, weight in packed.plain.items():
        assert weight.dtype == np.float32 and weight.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recipe_of_the_golden_folders_gives_the_same_bytes_today(variant, tmp_path):
    pack(source(tmp_path / "model", variant), tmp_path / "packed", **VARIANTS[variant])
    files = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert files == sorted(path.name for path in (GOLDEN / variant).iterdir())
    for name in files:
        written, golden = tmp_path / "packed" / name, GOLDEN / variant / name
        if name == MANIFEST:
            same = {"pruneofa": "", **({"sizes": ""} if COMPRESSED in files else {})}
            assert read_json(written) | same == read_json(golden) | same
        elif name != COMPRESSED:  # another version of zstd may write other bytes
            assert written.read_bytes() == golden.read_bytes()


def test_the_example_of_the_specification_byte_by_byte():
    text = FORMAT.read_text(encoding="utf-8")
    lines = text.split("```hex\n")[1].split("```")[0].splitlines()
    raw = bytes.fromhex("".join(line[6:53] for line in lines))
    weight = np.zeros((2, 16), np.float32)
    weight[0, [0, 3, 15]] = 1, -0.25, 0.75
    weight[1, [9, 10]] = 127, 0.25
    linear = pack_linear(weight, "int8")
    name = "encoder.layer.0.output.dense.weight"
    entry = {"shape": [2, 16], "kind": "linear", "dtype": "F32", "nonzeros": 5, "pattern": "unstructured"}
    arrays = {f"{name}.{part}": getattr(linear, part) for part in ("bitmask", "values", "scale")}
    slots = layout({name: Tensor(**entry)}, "int8")
    assert header(slots, METADATA) + b"".join(arrays[stored].tobytes() for stored in slots) == raw
    assert raw[0x160:].hex(" ") == "04 02 01 3c 00 00 80 3f 7f e0 5f 7f 00 09 80 00 06"
    assert f"crc32:{zlib.crc32(raw):08x}" in text
    np.testing.assert_array_equal(linear.dense()[1, [8, 9, 10]], [0, 127, 0])


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_safetensors_library_reads_what_is_written(precision, model, tmp_path):
    manifest = pack(model, tmp_path / "packed", precision=precision).to_json()
    found = load_file(tmp_path / "packed" / TENSORS)
    slots = layout({name: Tensor(**entry) for name, entry in manifest["tensors"].items()}, precision)
    names = {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}
    assert {name: (names[a.dtype], a.shape) for name, a in found.items()} == {n: s[:2] for n, s in slots.items()}
    weight = tensors()[f"bert.{QUERY}"]
    np.testing.assert_array_equal(unpack_bits(found[f"{QUERY}.bitmask"], 4), weight != 0)
    assert (f"{QUERY}.scale" in found) == (precision == "int8")
    marked = found.get("encoder.layer.0.output.dense.weight.negative_zeros")
    assert [name for name in found if name.endswith("negative_zeros")] == (
        [] if marked is None else ["encoder.layer.0.output.dense.weight.negative_zeros"]
    )
    assert (marked is None) == (precision == "int8")
    if marked is not None:
        assert np.argwhere(unpack_bits(marked, 10)).tolist() == [[1, 3]]


def test_a_file_of_another_order_is_read(model, tmp_path):
    """Another writer, such as the safetensors library itself, sorts otherwise."""
    manifest = pack(model, tmp_path / "packed").to_json()
    file = tmp_path / "packed" / TENSORS
    save_file(load_file(file), file, METADATA)
    size, checksum = file.stat().st_size, f"crc32:{zlib.crc32(file.read_bytes()):08x}"
    edited = manifest | {"checksum": checksum, "sizes": manifest["sizes"] | {"file": size}}
    write_json(tmp_path / "packed" / MANIFEST, edited)
    assert read(tmp_path / "packed").linears[QUERY].values.size == manifest["tensors"][QUERY]["nonzeros"]


def test_the_manifest_says_what_the_source_is(model, tmp_path):
    manifest = pack(model, tmp_path / "packed").to_json()
    dense = pattern.inspect(model)
    assert manifest["pattern_hash"] == dense["pattern_hash"] and manifest["pooler_hash"] == dense["pooler_hash"]
    assert manifest["sparsity"] == dense["encoder"]
    assert manifest["sizes"]["entropy_bound"] * dense["weights"] == pytest.approx(
        8 * dense["sizes"]["entropy_bound_int8"], abs=8
    )
    assert manifest["architecture"] == "BertForSequenceClassification" and manifest["prefix"] == "bert."
    digest = hashlib.sha256()
    for name, weight in sorted(tensors().items(), key=lambda item: families.base_name(item[0])):
        digest.update(f"{name}\0F32\0{'x'.join(map(str, weight.shape))}\0".encode() + weight.tobytes())
    assert manifest["source"] == digest.hexdigest()
    assert inspect(tmp_path / "packed")["layers"][QUERY]["nonzeros"] == dense["layers"][QUERY]["nonzeros"]


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("hidden", "limit"), [(768, 1.85), (384, 1.88)], ids=["BERT-Base", "MiniLM"])
def test_bits_per_weight_of_one_layer(hidden, limit, tmp_path):
    rng = np.random.default_rng(hidden)
    shapes = dict.fromkeys(["attention.self.query", "attention.self.key", "attention.self.value",
                            "attention.output.dense"], (hidden, hidden))  # fmt: skip
    shapes |= {"intermediate.dense": (4 * hidden, hidden), "output.dense": (hidden, 4 * hidden)}
    folder = source(tmp_path / "model")
    weights = {f"{LAYER}{name}.weight": gaussian(rng, *shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    manifest = pack(folder, tmp_path / "packed", compress=True).to_json()
    sizes = manifest["sizes"]
    counted = sum(w.size for w in weights.values())
    assert manifest["sparsity"] == pytest.approx(0.9, abs=1e-5)
    assert sizes["bits_per_weight"] == pytest.approx(1.8 + 32 * 9 * hidden / counted, abs=1e-3)
    assert sizes["entropy_bound"] == pytest.approx(0.8 + 0.469, abs=1e-3)
    assert sizes["bits_per_weight"] <= limit
    assert sizes["compressed_bits_per_weight"] <= 1.35
    assert (tmp_path / "packed" / COMPRESSED).stat().st_size == sizes["compressed"]
    assert 8 * sizes["compressed"] / counted - sizes["compressed_bits_per_weight"] < 0.01  # next to nothing else in it
    row = (
        f"| {sizes['bits_per_weight']:.2f} | {sizes['compressed_bits_per_weight']:.2f} | {sizes['entropy_bound']:.2f} |"
    )
    assert row in FORMAT.read_text(encoding="utf-8")
    packed = read(tmp_path / "packed")
    for name, weight in weights.items():
        np.testing.assert_array_equal(packed.linears[name.removeprefix("bert.")].kept, weight != 0)


@pytest.mark.usefixtures("parts")
def test_block_patterns_compress_by_repetition(tmp_path):
    folder = source(tmp_path / "model")
    weight = np.repeat(gaussian(np.random.default_rng(0), 64, 512, 0.8), 4, axis=0)
    save_file({f"{LAYER}output.dense.weight": weight}, folder / "model.safetensors")
    manifest = pack(folder, tmp_path / "packed", compress=True).to_json()
    assert manifest["tensors"]["encoder.layer.0.output.dense.weight"]["pattern"] == "4x1"
    assert manifest["sizes"]["compressed_encoder"] < manifest["sizes"]["encoder"] / 2


# There and back


shapes = st.tuples(st.integers(1, 9), st.integers(1, 27))
numbers = st.one_of(st.sampled_from([0.0, -0.0]), st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(deadline=None)
@given(hnp.arrays(np.float32, shapes, elements=numbers, fill=st.just(np.float32(0))))
def test_any_weight_comes_back_bit_for_bit(weight):
    linear = pack_linear(weight, "fp32")
    assert linear.dense().tobytes() == weight.tobytes()
    assert linear.bitmask.shape == (weight.shape[0], -(-weight.shape[1] // 8))
    assert (linear.negative_zeros is not None) == bool((np.signbit(weight) & (weight == 0)).any())
    assert pattern_hashes([(QUERY, linear.shape, linear.pattern_bits)])[0] == pattern.pattern_hash({QUERY: weight != 0})
    assert pattern_holds(linear.kept, pattern_of(linear.kept))


@settings(deadline=None)
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
    assert pattern.verify(model, tmp_path / "again")["ok"]


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


@pytest.mark.usefixtures("parts")
def test_memory_holds_the_packed_model_and_one_tensor(model, tmp_path):
    rng = np.random.default_rng(0)
    layers = {f"bert.encoder.layer.{i}.output.dense.weight": gaussian(rng, 256, 1024) for i in range(12)}
    save_file(layers, model / "model.safetensors")
    dense, one = sum(w.nbytes for w in layers.values()), 256 * 1024 * 4
    pack(model, tmp_path / "warm")
    tracemalloc.start()
    try:
        manifest = pack(model, tmp_path / "packed").to_json()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < manifest["sizes"]["file"] + 6 * one + 2**20 < dense


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        (np.ones((4, 8), bool), "unstructured"),
        (np.zeros((4, 8), bool), "unstructured"),
        (np.repeat(np.eye(2, 8, dtype=bool), 4, axis=0), "4x1"),
        (np.repeat(np.eye(3, 2, dtype=bool), 4, axis=1), "1x4"),
        (np.tile([True, False, False, True, False, True, True, False], (3, 1)), "1:2"),
        (np.tile([True, True, False, False, False, True, True, False], (3, 1)), "2:4"),
        (np.tile([True, False, False, False], (3, 2)), "1:4"),
        (np.eye(5, 8, dtype=bool), "1:8"),
        (np.eye(6, 7, dtype=bool), "unstructured"),
        (np.repeat(np.eye(2, 8, dtype=bool), 4, axis=0)[:7], "1:8"),
    ],
)
def test_patterns_are_recognised(kept, found):
    assert pattern_of(kept) == found


# What cannot be packed


def change(folder, **edits):
    weights = tensors() | edits
    save_file({name: weight for name, weight in weights.items() if weight is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [f"bert.{QUERY}", "classifier.bias", "bert." + WORDS])
def test_weights_that_are_no_numbers(name, value, model, tmp_path):
    weight = tensors()[name]
    weight.reshape(-1)[1] = value
    change(model, **{name: weight})
    with pytest.raises(InputError, match=f"{name} has 1 NaN or infinite; wanted numbers"):
        pack(model, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        (
            "classifier.weight",
            np.ones((2, 4), np.int8),
            "classifier.weight has dtype I8; wanted F32, F16, BF16: convert",
        ),
        ("classifier.weight", np.ones((2, 4)), "classifier.weight has dtype F64; wanted F32"),
        ("classifier.weight", np.ones((0, 4), np.float32), r"has shape \[0, 4\], no number in it"),
        ("classifier.weight", np.ones((1,) * 9, np.float32), "shape is .*wanted at most 8"),
        (QUERY, np.ones((4, 4), np.float32), f"are both {QUERY}; keep only one"),
        ("bert.embeddings.LayerNorm.gamma", np.ones(4, np.float32), "are both embeddings.LayerNorm.weight"),
        ("größe", np.ones(4, np.float32), r"a tensor is 'gr\\xf6\\xdfe'; wanted a name"),
        (f"bert.{QUERY}", np.ones((1, 2**16 + 1), np.float32), "wanted at most 65536 columns"),
        (f"{WORDS}.values", np.ones(4, np.float32), f"two tensors would both be stored as {WORDS}.values"),
    ],
)
def test_tensors_that_cannot_be_packed(name, weight, message, model, tmp_path):
    change(model, **{name: weight})
    with pytest.raises(InputError, match=message):
        pack(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_folders_that_cannot_be_packed(model, tmp_path):
    out = tmp_path / "packed"
    with pytest.raises(InputError, match="precision is 'int4'; wanted one of int8, fp32"):
        pack(model, out, precision="int4")
    write_json(model / "config.json", CONFIG | {"model_type": "gpt2"})
    with pytest.raises(InputError, match="model_type is 'gpt2'; wanted one of bert, distilbert, roberta"):
        pack(model, out)
    write_json(model / "config.json", CONFIG | {"architectures": [{}]})
    with pytest.raises(InputError, match="architectures is .*; wanted a list of class names"):
        pack(model, out)
    write_json(model / "config.json", CONFIG)
    save_file({"classifier.bias": np.ones(2, np.float32)}, model / "model.safetensors")
    with pytest.raises(InputError, match="no weight named encoder.layer.N or transformer.layer.N"):
        pack(model, out)
    (model / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match="no tokenizer.json in it, which the engine needs, nor vocab.txt to make it from"
    ):
        pack(model, out)
    with pytest.raises(InputError, match="v1-int8: is packed already; wanted a Hugging Face folder"):
        pack(GOLDEN / "v1-int8", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "wanted a JSON array, got dict"),
        (["Transformer"], "module 'Transformer', wanted an object with type and path"),
        ([{"path": "2_Dense", "type": "models.Dense"}], "module 'Dense', wanted only Transformer, Pooling, Normalize"),
        ([{"path": "../elsewhere", "type": "models.Pooling"}], "path of Pooling is '../elsewhere', wanted a folder"),
        ([{"path": "/etc", "type": "models.Pooling"}], "the path of Pooling is '/etc', wanted a folder beside"),
        ([{"path": 1, "type": "Pooling"}], "wanted an object with type and path"),
        ([{"path": "", "type": None}], "wanted an object with type and path"),
    ],
)
def test_modules_that_cannot_be_packed(modules, message, model, tmp_path):
    write_json(model / "modules.json", modules)
    with pytest.raises(InputError, match=message):
        pack(model, tmp_path / "packed")


def test_output_that_holds_something(model, tmp_path):
    file, full, empty = tmp_path / "file", tmp_path / "full", tmp_path / "empty"
    file.write_text("mine")
    full.mkdir()
    (full / "mine").write_text("mine")
    empty.mkdir()
    for out in (file, full):
        with pytest.raises(InputError, match="exists and is not an empty folder; name another one"):
            pack(model, out)
        with pytest.raises(InputError, match="exists and is not an empty folder; name another one"):
            unpack(GOLDEN / "v1-int8", out)
    with pytest.raises(InputError, match="name a folder that you may write to"):
        pack(model, file / "below")
    pack(model, empty)
    assert (empty / MANIFEST).is_file() and file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "model"]


def test_what_would_shrink_too_much_is_not_compressed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("pruneofa.formats.pack.MAX_SLACK", 0)  # a MiB, with which the model would have to be large
    weight = np.zeros((256, 8192), np.float32)
    weight[0, 0] = 1
    save_file({f"bert.{QUERY}": weight}, model / "model.safetensors")
    with pytest.raises(InputError, match="shrinks over 64 times, more than readers allow; do not compress"):
        pack(model, tmp_path / "packed", compress=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "silu"}, "activation 'silu' .*; run this model with transformers"),
        ({"architectures": ["BertForMultipleChoice"]}, "architecture 'BertForMultipleChoice' .*; save the model"),
        ({"architectures": ["BertLMHeadModel"]}, "architecture 'BertLMHeadModel' .*; save the model"),
        ({"architectures": ["BertForQuestionAnswering"]}, "no tensor qa_outputs.weight"),
    ],
)
def test_what_the_engine_refuses_is_not_packed(config, message, model, tmp_path):
    write_json(model / "config.json", CONFIG | config)
    with pytest.raises(InputError, match=message):
        pack(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_names_of_old_quantization_aware_training_are_not_packed(model, tmp_path):
    weights = {name.replace("query.weight", "query.module.weight"): weight for name, weight in tensors().items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"query\.module\.weight, .*take '\.module' out of the names"):
        pack(model, tmp_path / "packed")
