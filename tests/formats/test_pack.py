"""The packed folder: what is written is what FORMAT.md says; what cannot be packed."""

import hashlib
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.convert import pack_linear
from pruneofa.formats.files import read_json, write_json
from pruneofa.formats.layout import header, layout
from pruneofa.formats.manifest import COMPRESSED, MANIFEST, METADATA, TENSORS, Tensor
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import Packed, inspect, read, unpack_bits
from pruneofa.formats.pattern import pattern_of
from pruneofa.formats.unpack import unpack
from tests.golden import BIASED, BIASED_CONFIG, CONFIG, GOLDEN, LAYER, STATIC, VARIANTS, source, tensors
from tests.tiny import modules_json

QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"
FORMAT = Path(__file__).parents[2] / "FORMAT.md"


def gaussian(rng, rows, columns, sparsity=0.9):
    weight = rng.standard_normal((rows, columns), np.float32)
    weight[np.abs(weight) < np.quantile(np.abs(weight), sparsity)] = 0
    return weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_folders_of_every_version_still_load(variant):
    packed = read(GOLDEN / variant)
    expected = {families.base_name(name): weight for name, weight in tensors(variant).items()}
    assert isinstance(packed, Packed) and packed.config == (BIASED_CONFIG if variant == BIASED else CONFIG)
    int8 = packed.precision == "int8"
    assert (len(packed.linears), len(packed.embeddings)) == ((6, 2) if variant == BIASED else (7, 3))
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
    with pytest.raises(InputError, match=f"{name} has 1 NaN or infinite values; wanted finite numbers"):
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
        ("classifier.weight", np.ones((0, 4), np.float32), r"has shape \[0, 4\], which is empty"),
        ("classifier.weight", np.ones((1,) * 9, np.float32), "shape is .*wanted at most 8"),
        (QUERY, np.ones((4, 4), np.float32), f"are both {QUERY}; keep only one"),
        ("bert.embeddings.LayerNorm.gamma", np.ones(4, np.float32), "are both embeddings.LayerNorm.weight"),
        ("größe", np.ones(4, np.float32), r"a tensor is 'gr\\xf6\\xdfe'; wanted a name"),
        (f"bert.{QUERY}", np.ones((1, 2**16), np.float32), "wanted at most 65535 columns"),
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
    with pytest.raises(InputError, match="v1-int8: is already packed; wanted a Hugging Face folder"):
        pack(GOLDEN / "v1-int8", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "wanted a JSON array, got dict"),
        (["Transformer"], "module 'Transformer', wanted an object with type and path"),
        (
            modules_json(Dense="2_Dense"),
            "module 'Dense', wanted only Transformer, Pooling, Normalize",
        ),
        (
            modules_json(Pooling="../elsewhere"),
            "path of Pooling is '../elsewhere', wanted a folder",
        ),
        (
            modules_json(Pooling="/etc"),
            "the path of Pooling is '/etc', wanted a folder beside",
        ),
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
        with pytest.raises(InputError, match="exists and is not an empty folder; choose another folder"):
            pack(model, out)
        with pytest.raises(InputError, match="exists and is not an empty folder; choose another folder"):
            unpack(GOLDEN / "v1-int8", out)
    with pytest.raises(InputError, match="choose a folder that you may write to"):
        pack(model, file / "below")
    pack(model, empty)
    assert (empty / MANIFEST).is_file() and file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "model"]


def test_what_would_shrink_too_much_is_not_compressed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("pruneofa.formats.pack.MAX_SLACK", 0)  # a MiB, with which the model would have to be large
    weight = np.zeros((256, 8192), np.float32)
    weight[0, 0] = 1
    save_file({f"bert.{QUERY}": weight}, model / "model.safetensors")
    with pytest.raises(InputError, match="compresses over 64 times, which readers refuse; do not compress"):
        pack(model, tmp_path / "packed", compress=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "silu"}, "activation 'silu' .*; run this model with transformers"),
        ({"architectures": ["BertForMultipleChoice"]}, "architecture 'BertForMultipleChoice' .*; save the model"),
        ({"architectures": ["BertLMHeadModel"]}, "architecture 'BertLMHeadModel' .*; save the model"),
        ({"architectures": ["BertForQuestionAnswering"]}, "no tensor qa_outputs.weight"),
        ({"vocab_size": CONFIG["vocab_size"] + 1}, "word_embeddings.weight has shape .*, config.json wants .*; copy"),
        ({"max_position_embeddings": 3}, "position_embeddings.weight has shape .*, config.json wants 3x.*; copy"),
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
    with pytest.raises(InputError, match=r"query\.module\.weight, .*remove '\.module' from the names"):
        pack(model, tmp_path / "packed")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_not_packed(model, tmp_path):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(InputError, match="but the model has .* word embeddings, wanted one for every id: .*resize"):
        pack(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
