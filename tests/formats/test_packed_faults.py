"""Packed folders whose manifest, header or tensors say what they must not: one line that names the fault."""

import json

import numpy as np
import pytest

from pruneofa.errors import InputError
from pruneofa.formats.files import MAX_JSON, read_json
from pruneofa.formats.manifest import MANIFEST, TENSORS
from pruneofa.formats.packed import PackedEmbedding, PackedLinear, inspect, read
from tests.broken import (
    HUGE,
    OUTPUT,
    QUERY,
    REMOVED,
    WORDS,
    WRONG,
    at,
    copy,
    parts,
    paths,
    put,
    refused,
    replaced,
    seal,
    state,
    write,
)

TIED = {"shape": [7, 4], "kind": "tied", "dtype": "F32", "to": WORDS}


# manifest.json


def fields(manifest):
    """Every field but those of tensors that are like one that is in it."""
    alike = {WORDS, QUERY, OUTPUT, "pooler.dense.weight", "classifier.bias"}
    return [path for path in paths(manifest) if path[0] != "tensors" or len(path) == 1 or path[1] in alike]


@pytest.mark.parametrize("variant", ["v1-fp32", "v1-int8-zstd"])
def test_every_field_of_the_manifest_removed_or_of_another_kind(variant, tmp_path):
    folder = copy(variant, tmp_path)
    manifest = read_json(folder / MANIFEST)
    assert len(fields(manifest)) > 45
    accepted = []
    for path in fields(manifest):
        for value in WRONG:
            if value is at(manifest, path):
                continue
            write(folder, replaced(manifest, path, value))
            try:
                read(folder)
            except InputError as error:
                assert str(folder) in str(error) and str(error).isascii() and len(str(error)) < 700
            else:
                accepted.append((path, value))
    # The version of the writer is for people; any text will do.
    assert accepted == [(("pruneofa",), "x"), (("pruneofa",), "\ud800")]


def test_sizes_that_are_no_floats(tmp_path):
    folder = copy("v1-int8-zstd", tmp_path)
    manifest = read_json(folder / MANIFEST)
    manifest["sizes"] |= {"compressed": 10**400, "compressed_encoder": 10**400}
    write(folder, manifest)
    assert "sizes: compressed is 1000" in refused(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "other", "format is 'other'; wanted \"pruneofa-packed\"; give a packed folder"),
        (("version",), 2, "format version 2; wanted 1; upgrade pruneofa"),
        (("precision",), "fp16", "precision is 'fp16'; wanted int8 or fp32"),
        (("architecture",), "BertModel", "architecture BertForSequenceClassification, but BertModel in manifest.json"),
        (("prefix",), "gpt.", """prefix is 'gpt.'; wanted such as "bert." or \"\""""),
        (("prefix",), REMOVED, "manifest.json: no prefix in it"),
        (("extra",), 1, "'extra' is unknown to format version 1"),
        (("sizes", "extra"), 1, "sizes: 'extra' is unknown to format version 1"),
        (("tensors", QUERY, "extra"), 1, f"tensor {QUERY}: 'extra' is unknown to format version 1"),
        (("compression",), "lzma", 'compression is \'lzma\'; wanted "zstd" or null'),
        (("checksum",), "crc32:0", "checksum is 'crc32:0'; wanted crc32: and 8 digits"),
        (("checksum",), "crc32:00000000", "damaged: crc32:"),
        (("activations",), {"kind": "static"}, "activations: no scales in it"),
        (("activations",), {"kind": "static", "scales": {}, "more": 1}, "activations: 'more' is unknown to format"),
        (("activations",), {"kind": "static", "scales": "x"}, "activations: scales is 'x'; wanted an object"),
        (("activations",), {"kind": "static", "scales": {}}, "no scale for 'encoder.layer.0.attention.output.dense."),
        (("activations",), {"kind": "learned"}, 'wanted {"kind": "dynamic"} or, for int8, {"kind": "static"'),
        (("sparsity",), 0.5, "sparsity is 0.5; wanted 0.75, from the tensors"),
        (("sizes", "encoder"), 5, "sizes: encoder is 5; wanted 190, from the tensors"),
        (("sizes", "bits_per_weight"), 1.0, "sizes: bits_per_weight is 1.0; wanted 10.5"),
        (("sizes", "entropy_bound"), 1.0, "sizes: entropy_bound is 1.0; wanted 2.79"),
        (("sizes", "file"), 4744, "4743 bytes; wanted 4744, as manifest.json states"),
        (("sizes", "file"), 30, "sizes: file is 30; wanted"),
        (("sizes", "file"), HUGE, "sizes: file is 1000000000000; wanted"),
        (("pattern_hash",), "0" * 64, "pattern_hash is 000"),
        (("pooler_hash",), "0" * 64, "pooler_hash is 000"),
        (("pooler_hash",), None, "pooler_hash is None; wanted 64 hexadecimal digits, as there is pooler.dense.weight"),
        (("tensors", "pooler.dense.weight"), REMOVED, "pooler_hash is '7f354"),
        (("tensors", "bert.x"), {}, "a tensor is 'bert.x'; wanted a name without prefix"),
        (("tensors", "a b"), {}, "a tensor is 'a b'; wanted a name"),
        (("tensors", QUERY, "kind"), "plain", f"tensor {QUERY}: 'nonzeros' is unknown"),
        (("tensors", QUERY, "kind"), "sparse", "kind is 'sparse'; wanted one of linear, embedding, plain, tied"),
        (("tensors", QUERY, "dtype"), "F64", "dtype is 'F64'; wanted one of F32, F16, BF16"),
        (("tensors", QUERY, "shape"), [4, 4, 1], "kind is 'linear'; wanted plain"),
        (("tensors", QUERY, "shape"), [4, 2**31], "wanted at most 8 positive integers below 2^31"),
        (("tensors", QUERY, "shape"), [4, 2**16], "wanted at most 65535 columns"),
        (("tensors", QUERY, "shape", 0), 4.0, "wanted at most 8 positive integers below 2^31"),
        (("tensors", QUERY, "shape"), [3, 4], "from the tensors"),
        (("tensors", QUERY, "nonzeros"), 17, "nonzeros is 17; wanted 0 to 16"),
        (("tensors", QUERY, "nonzeros"), 3, "from the tensors"),
        (("tensors", QUERY, "pattern"), "8x1", "pattern is '8x1'; wanted unstructured, 4x1, 1x4 or n:m"),
        (("tensors", QUERY, "pattern"), "4:2", "pattern is '4:2'; wanted unstructured"),
        (("tensors", QUERY, "pattern"), "4x1", f"{QUERY}: its zeros do not have pattern 4x1, which the manifest"),
        (("tensors", QUERY, "pattern"), "1x4", "its zeros do not have pattern 1x4"),
        (("tensors", QUERY, "pattern"), "2:4", "its zeros do not have pattern 2:4"),
        (("tensors", QUERY, "pattern"), "2:3", "its zeros do not have pattern 2:3"),
        (("tensors", QUERY, "negative_zeros"), 1, "'negative_zeros' is unknown"),
        (("tensors", QUERY, "stored_as"), "other", "stored_as is 'other'; wanted a name of"),
        (("tensors", "classifier.bias", "stored_as"), "module.classifier.weight", "stored_as is 'module.class"),
        (("tensors", "extra"), {"shape": [1], "kind": "plain", "dtype": "F32"}, "the header has"),
        (("tensors", "classifier.weight", "shape"), [4, 2], "classifier.weight: [2, 4]; wanted shape [4, 2]"),
        (("tensors", "classifier.weight"), TIED | {"to": QUERY}, f"to is '{QUERY}'; wanted an embedding"),
        (("tensors", "classifier.weight"), TIED | {"shape": [2, 4]}, "to is"),
        (("tensors", "classifier.weight"), TIED | {"to": []}, "to is []"),
        (("tensors", WORDS), TIED | {"to": WORDS}, "kind is 'tied'; wanted embedding"),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_or_the_tensors(path, value, message, int8):
    manifest = read_json(int8 / MANIFEST)
    write(int8, replaced(manifest, path, value))
    assert message in refused(int8)


def test_two_tensors_of_one_name(int8):
    manifest = read_json(int8 / MANIFEST)
    entry = {"shape": [2, 4], "kind": "plain", "dtype": "F32"}
    write(int8, replaced(manifest, ("tensors", f"{WORDS}.values"), entry))
    assert f"stored as {WORDS}.values" in refused(int8)
    write(int8, replaced(manifest, ("tensors", "b.weight"), entry | {"stored_as": "module.c.weight"}))
    assert "stored_as is 'module.c.weight'; wanted a name of b.weight" in refused(int8)


def test_negative_zeros_must_be_as_many_as_stated(fp32):
    manifest = read_json(fp32 / MANIFEST)
    for value, message in (
        (2, "1 negative zeros marked, but 2 in the manifest"),
        (100, "negative_zeros is 100; wanted 1 to"),
    ):
        write(fp32, replaced(manifest, ("tensors", OUTPUT, "negative_zeros"), value))
        assert message in refused(fp32)


NO_JSON = [
    b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{} {}", b'{"a": 1, "a": 2}',
    b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000,
    b'{"version": ' + b"9" * 5000 + b"}", "{}".encode("utf-16"), b"\0" * 100,
]  # fmt: skip


@pytest.mark.parametrize("name", [MANIFEST, "config.json"])
@pytest.mark.parametrize("raw", NO_JSON, ids=range(len(NO_JSON)))
def test_files_that_are_not_the_json_they_should_be(name, raw, int8):
    (int8 / name).write_bytes(raw)
    assert name in refused(int8)


def test_json_of_any_size_and_files_that_are_missing(int8):
    path = int8 / MANIFEST
    whole = path.read_bytes()
    path.write_bytes(whole + b" " * MAX_JSON)
    assert f"larger than {MAX_JSON} bytes" in refused(int8)
    path.write_bytes(whole)
    for name in ("config.json", TENSORS):
        kept = (int8 / name).read_bytes()
        (int8 / name).unlink()
        missing = "no such file" if name == "config.json" else "cannot be read ("
        assert f"{name}: {missing}" in refused(int8)
        (int8 / name).mkdir()
        assert f"{name}: cannot be read (" in refused(int8)
        (int8 / name).rmdir()
        (int8 / name).write_bytes(kept)
    (int8 / "tokenizer.json").unlink()
    assert "no tokenizer.json in it" in refused(int8)
    path.unlink()
    assert "no manifest.json, so not a packed folder; make one with: pruneofa pack" in refused(int8)


def test_inspect_checks_the_manifest_too(int8):
    write(int8, replaced(read_json(int8 / MANIFEST), ("sizes", "file"), REMOVED))
    with pytest.raises(InputError, match="sizes: no file in it"):
        inspect(int8)


def test_a_config_of_another_model(int8):
    config = read_json(int8 / "config.json")
    for change, message in (
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": ["bert"]}, "model_type is ['bert']"),
        ({"architectures": None}, "architecture None, but BertForSequenceClassification in manifest.json"),
        ({"architectures": "BertModel"}, "architectures is 'BertModel'; wanted a list of class names"),
        ({"architectures": [7]}, "architectures is [7]"),
    ):
        (int8 / "config.json").write_text(json.dumps(config | change))
        assert message in refused(int8)


# The header of the tensor file


def test_every_field_of_the_header_removed_or_of_another_kind(fp32):
    head, data = parts(fp32)
    names = [f"{QUERY}.bitmask", f"{OUTPUT}.values", "classifier.bias", "__metadata__"]
    for path in [path for path in paths(head) if path[0] in names]:
        for value in WRONG:
            seal(fp32, replaced(head, path, value), data)
            assert f"{TENSORS}: " in refused(fp32), (path, value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("__metadata__",), {"format": "pt"}, "no __metadata__ of {'format': 'pruneofa-packed', 'version': '1'}"),
        (
            ("extra",),
            {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
            "'extra' is in the header, but not in manifest",
        ),
        ((f"{QUERY}.values",), REMOVED, f"'{QUERY}.values' is in manifest.json, but not in the header"),
        ((f"{QUERY}.values", "dtype"), "F16", f"header: {QUERY}.values: 'F16'; wanted dtype I8"),
        ((f"{QUERY}.values", "shape"), [HUGE], f"{QUERY}.values: [1000000000000]; wanted shape [5]"),
        ((f"{QUERY}.values", "shape"), [5.0], "[5.0]; wanted shape [5]"),
        ((f"{QUERY}.values", "data_offsets"), [0, HUGE], "[0, 1000000000000]; wanted data_offsets of 5 bytes"),
        ((f"{QUERY}.values", "data_offsets"), [-5, 0], "[-5, 0]; wanted data_offsets of 5 bytes"),
        ((f"{QUERY}.values", "data_offsets"), [0, 5], "starts at 0; wanted"),
        ((f"{QUERY}.values", "data_offsets"), [HUGE, HUGE + 5], "no gap or overlap"),
        (("classifier.bias", "data_offsets"), [0, 8, 9], "wanted data_offsets of 8 bytes"),
        (("classifier.bias", "more"), 1, "wanted dtype, shape and data_offsets"),
    ],
)
def test_a_header_that_contradicts_the_manifest(path, value, message, int8):
    head, data = parts(int8)
    if path[-1] == "shape":
        assert head[path[0]]["shape"] == [5]
    seal(int8, replaced(head, path, value), data)
    assert message in refused(int8)


@pytest.mark.parametrize("raw", NO_JSON, ids=range(len(NO_JSON)))
def test_headers_that_are_not_json(raw, int8):
    _, data = parts(int8)
    seal(int8, raw, data)
    assert (f"{TENSORS}: " if raw else "sizes: file") in refused(int8)


@pytest.mark.parametrize("length", [0, 1, 4000, MAX_JSON + 1, HUGE, 2**63, 2**64 - 1])
def test_a_header_of_any_length(length, int8):
    file = int8 / TENSORS
    raw = length.to_bytes(8, "little") + file.read_bytes()[8:]
    file.write_bytes(raw)
    state(int8, raw)
    assert f"the header has {length} bytes; wanted " in refused(int8)


def test_a_header_with_a_key_twice(int8):
    head, data = parts(int8)
    text = json.dumps(head).encode()
    seal(int8, text[:-1] + b"," + text[1:], data)
    assert "header: not valid JSON (a key occurs twice)" in refused(int8)
    seal(int8, b" " + text, data)
    assert "header does not begin with an object" in refused(int8)


# The tensors


def write_at(place, value):
    """What `put` does to the array."""
    return lambda array: array.__setitem__(place, value)


@pytest.mark.parametrize(
    ("variant", "name", "edit", "message"),
    [
        ("v1-int8", f"{QUERY}.bitmask", lambda a: a.__ior__(16), "bits set beyond column 4"),
        ("v1-int8", f"{QUERY}.bitmask", write_at((1, 0), 1), "6 bits set, but there are 5 values"),
        ("v1-int8", f"{QUERY}.bitmask", lambda a: np.copyto(a, a[::-1].copy()), "pattern_hash is"),
        ("v1-int8", f"{WORDS}.values", write_at((0, 0), -128), f"{WORDS}: values has -128; wanted -127 to 127"),
        ("v1-int8", f"{QUERY}.scale", write_at(0, np.nan), f"{QUERY}: scale contains NaN or infinity"),
        ("v1-int8", f"{QUERY}.scale", write_at(0, 3e38), "a number that is not above 0 and at most 2.67"),
        ("v1-int8", f"{QUERY}.scale", write_at(0, 0), "scale contains a number that is not above 0 and at most 2.67"),
        ("v1-int8", f"{WORDS}.scale", write_at(0, -1), f"{WORDS}: scale contains a number that is not above 0"),
        ("v1-int8", "classifier.bias", write_at(1, np.inf), "classifier.bias: the tensor contains NaN or infinity"),
        ("v1-fp32", f"{QUERY}.values", write_at(0, np.nan), f"{QUERY}: values contains NaN or infinity"),
        ("v1-fp32", f"{QUERY}.values", write_at(0, -0.0), "values contains a zero; wanted kept weights"),
        ("v1-fp32", WORDS, write_at((0, 0), np.inf), f"{WORDS}: values contains NaN or infinity"),
        ("v1-fp32", f"{OUTPUT}.negative_zeros", write_at((0, 0), 255), "a weight that bitmask keeps"),
        ("v1-fp32", f"{OUTPUT}.negative_zeros", write_at((1, 1), 128), "bits set beyond column 10"),
        ("v1-fp32", f"{OUTPUT}.negative_zeros", write_at((1, 0), 0), "0 negative zeros marked, but 1"),
    ],
)  # fmt: skip
def test_tensors_that_no_packing_gives(variant, name, edit, message, tmp_path):
    folder = copy(variant, tmp_path)
    put(folder, name, edit)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"bitmask": np.zeros((2, 1), np.uint8)}, r"bitmask is uint8 \(2, 1\); wanted uint8 \(2, 2\)"),
        ({"bitmask": np.zeros((2, 2), np.int8)}, r"bitmask is int8 \(2, 2\); wanted uint8"),
        ({"values": np.ones(1, np.int8)}, "values is int8; wanted float32 without scale"),
        ({"scale": np.ones(2, np.float32)}, "values is float32; wanted int8 with scale"),
        ({"values": np.ones(1, np.int8), "scale": np.ones(3, np.float32)}, r"scale is float32 \(3,\); wanted float32"),
        ({"values": np.ones(1, np.int8), "scale": np.ones(2)}, r"scale is float64 \(2,\); wanted float32"),
        ({"values": np.ones(1, np.int8), "scale": np.ones(2, np.float32), "negative_zeros": np.zeros((2, 2), np.uint8)},
         "negative_zeros given with int8 values"),
        ({"negative_zeros": np.zeros((2, 1), np.uint8)}, "negative_zeros is uint8"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_make_a_weight(arrays, message):
    good = {"bitmask": np.uint8([[1, 0], [0, 0]]), "values": np.ones(1, np.float32)}
    assert PackedLinear((2, 10), **good).dense().sum() == 1
    with pytest.raises(InputError, match=message):
        PackedLinear((2, 10), **(good | arrays))
    with pytest.raises(InputError, match="values is float32; wanted int8 with scale"):
        PackedEmbedding(np.ones((2, 3), np.float32), np.ones(2, np.float32))
