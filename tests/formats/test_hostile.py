"""Folders whose author wants harm: everything ends in one line, at once, and with little memory."""

import base64
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import zstandard

from pruneofa.engine.engine import Engine
from pruneofa.errors import InputError, short
from pruneofa.formats import tokenizer_file
from pruneofa.formats.files import read_bytes
from pruneofa.formats.manifest import COMPRESSED, MANIFEST, TENSORS
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import read
from pruneofa.formats.pattern import inspect
from pruneofa.formats.sentence import read_sentence
from pruneofa.formats.tensors import weight_files
from pruneofa.formats.unpack import unpack
from tests.tiny import modules_json, write_folder


def refused(attempt) -> str:
    with pytest.raises(InputError) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900
    return message


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def change_tokenizer(folder, **parts):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


# Files that are not files, and files that are too large


OPTIONAL = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
            "tokenizer_config.json", "special_tokens_map.json", "quantization.json", MANIFEST]  # fmt: skip
FORMS = {"fifo": os.mkfifo, "link": lambda path: path.symlink_to("nothing"), "folder": os.mkdir}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", *OPTIONAL])
@pytest.mark.timeout(60)
def test_what_is_no_file_is_neither_waited_for_nor_taken_as_missing(name, form, folder):
    if name in OPTIONAL[1:4]:
        modules = modules_json()
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
    if name == MANIFEST:
        (folder / TENSORS).write_bytes(b"")
    (folder / name).unlink(missing_ok=True)
    FORMS[form](folder / name)
    assert name in refused(lambda: Engine.from_pretrained(folder))
    assert name in refused(lambda: pack(folder, folder.parent / "packed")) or name == MANIFEST  # "is already packed"


@pytest.mark.timeout(60)
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        assert "regular file" in refused(lambda path=path: read_bytes(path, 9)) or path == tmp_path


@pytest.mark.parametrize("name", [MANIFEST, COMPRESSED])
@pytest.mark.timeout(60)
def test_a_fifo_in_a_packed_folder_is_not_waited_for(name, model, tmp_path):
    pack(model, tmp_path / "packed", compress=True)
    (tmp_path / "packed" / name).unlink()
    os.mkfifo(tmp_path / "packed" / name)
    assert name in refused(lambda: read(tmp_path / "packed"))


@pytest.mark.parametrize(
    ("name", "content", "limit"),
    [
        ("modules.json", b"[" + b"{},", 1 << 16),
        ("1_Pooling/config.json", b'{"a": [' + b"{},", 1 << 16),
        ("sentence_bert_config.json", b'{"a": [' + b"{},", 1 << 16),
        ("config.json", b'{"a": [' + b"{},", 4 << 20),
        ("model.safetensors.index.json", b'{"a": [' + b"{},", 4 << 20),
        ("tokenizer.json", b'{"a": [' + b"{},", 64 << 20),
    ],
)
def test_files_that_are_too_large_are_not_read(name, content, limit, folder):
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    if name in ("1_Pooling/config.json", "sentence_bert_config.json"):
        modules = modules_json()
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
    with open(folder / name, "wb") as file:
        file.write(content)
        file.truncate(200 << 20)  # a hole: it takes no disk
    tracemalloc.start()
    message = refused(lambda: Engine.from_pretrained(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"larger than {limit} bytes ({200 << 20})" in message and name in message
    assert peak < 8 << 20


def test_a_header_that_claims_gigabytes_is_not_read(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.write((90 << 20).to_bytes(8, "little"))
        file.truncate(200 << 20)
    tracemalloc.start()
    message = refused(lambda: Engine.from_pretrained(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"its header has {90 << 20} bytes; wanted at most" in message and peak < 8 << 20


@pytest.mark.timeout(60)
def test_layers_that_config_json_only_claims_take_no_memory(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31 - 1}))
    for attempt in (Engine.from_pretrained, inspect, lambda path: pack(path, folder.parent / "packed")):
        tracemalloc.start()
        message = refused(lambda attempt=attempt: attempt(folder))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "no tensor encoder.layer.2." in message and peak < 8 << 20


STRANGE = [None, 3, [], {}, {"a": 3}, {"a": {"b": "c"}}, {"a": ["x"]}, {"a": "x/../y"}, {"a": ".."},
           {"a": "../../etc/passwd"}, {"a": "\0"}, {"a": "\x1b[2J"}, {"a": "\u00e9" * 200}]  # fmt: skip


@pytest.mark.parametrize("weight_map", STRANGE)
def test_strange_indexes_of_shards(weight_map, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refused(lambda: weight_files(folder))
    assert "model.safetensors.index.json" in message and message.isprintable()


@pytest.mark.parametrize("path", ["x/..", "..", "/etc", "../private", "1_Pooling\0", "a" * 300, "\x1b[2J"])
def test_modules_do_not_lead_out_of_the_folder(path, folder):
    modules = modules_json(Transformer="", Pooling=path)
    (folder / "modules.json").write_text(json.dumps(modules))
    for attempt in (lambda: read_sentence(folder), lambda: pack(folder, folder.parent / "out")):
        message = refused(attempt)
        assert message.isprintable()


# Links


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.txt", "special_tokens_map.json"])
def test_links_out_of_the_folder_are_not_copied(name, folder, tmp_path):
    (tmp_path / "private").write_text('{"secret": 1}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    assert "a link to" in refused(lambda: pack(folder, tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()


def test_a_module_folder_that_is_a_link_is_not_copied(folder, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text('{"pooling_mode_mean_tokens": true, "secret": 1}')
    modules = modules_json()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").symlink_to(tmp_path / "private")
    assert "a link to" in refused(lambda: pack(folder, tmp_path / "packed"))


def test_links_of_the_hubs_cache_are_followed(model, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    pack(snapshot, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


# Compressed tensors


@pytest.mark.parametrize("behind", [b"\0", b"\x50\x2a\x4d\x18\4\0\0\0abcd", zstandard.compress(b""),
                                    zstandard.compress(b"x")])  # fmt: skip
def test_nothing_follows_the_frame(behind, model, tmp_path):
    pack(model, tmp_path / "packed", compress=True)
    file, stated = tmp_path / "packed" / COMPRESSED, tmp_path / "packed" / MANIFEST
    manifest = json.loads(stated.read_text())
    file.write_bytes(file.read_bytes() + behind)
    sizes = manifest["sizes"]
    sizes["compressed"] += len(behind)
    stated.write_text(json.dumps(manifest))
    assert "has data after" in refused(lambda: read(tmp_path / "packed"))


# Tokenizers

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {**REPLACE, "content": "x" * 10**6}}, "replacements of a growth"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 8}}, "replacements of a growth"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "a prefix of 1000000 characters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "character map"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "character map"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a?" * 600}}}, "a pattern of 1200 characters"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 300}}, "over 256 components"),
    ],
)
def test_tokenizers_that_hang_or_take_all_memory_are_not_loaded(parts, message, folder):
    change_tokenizer(folder, **parts)
    said = refused(lambda: Engine.from_pretrained(folder))
    assert message in said and str(folder / "tokenizer.json") in said


def test_components_nested_deeply_are_not_loaded(folder):
    nested = {"type": "Whitespace"}
    for _ in range(30):
        nested = {"type": "Sequence", "pretokenizers": [nested]}
    change_tokenizer(folder, pre_tokenizer=nested)
    assert "levels" in refused(lambda: Engine.from_pretrained(folder))


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}],
                            "pair": [SEQUENCE], "special_tokens": {}}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                            "pair": [SEQUENCE], "special_tokens": {}}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "\u00e9": 1, "a\u00e9": 2}, "merges": ["\u00e9 a"],
                   "continuing_subword_prefix": "\u00e9" * 5}},
    ],
)  # fmt: skip
def test_tokenizers_that_panic_end_in_one_line(parts, folder):
    change_tokenizer(folder, **parts)

    def run():
        Engine.from_pretrained(folder).predict(["a" * 50 + "! film", ("a", "a")])

    assert "tokenizer" in refused(run)


def test_a_tokenizer_for_another_vocabulary_is_named_when_it_is_used(folder):
    special = {"[X]": {"id": "[X]", "ids": [4294967295], "tokens": ["[X]"]}}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, SEQUENCE],
                "pair": [SEQUENCE], "special_tokens": special}  # fmt: skip
    change_tokenizer(folder, post_processor=template)
    message = refused(lambda: Engine.from_pretrained(folder).predict("film"))
    assert "token 4294967295" in message and "tokenizer.json" in message
    template["single"] = [{"Sequence": {"id": "A", "type_id": 4000000000}}]
    change_tokenizer(folder, post_processor=template)
    assert "of type 4000000000" in refused(lambda: Engine.from_pretrained(folder).predict("film"))


def test_more_special_tokens_than_the_model_takes(folder):
    special = {"[X]": {"id": "[X]", "ids": [1] * 100, "tokens": ["[X]"] * 100}}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, SEQUENCE],
                "pair": [SEQUENCE], "special_tokens": special}  # fmt: skip
    change_tokenizer(folder, post_processor=template)
    engine = Engine.from_pretrained(folder)
    assert "adds 100 special tokens" in refused(lambda: engine.predict("film", truncate=True))


@pytest.mark.parametrize("name", ["single", "pair"])
def test_templates_that_multiply_their_special_tokens(folder, name):
    special = {"[X]": {"id": "[X]", "ids": [1] * 100, "tokens": ["[X]"] * 100}}
    template = {"type": "TemplateProcessing", "single": [SEQUENCE], "pair": [SEQUENCE], "special_tokens": special}
    template[name] = [{"SpecialToken": {"id": "[X]", "type_id": 0}}] * 3 + [SEQUENCE]
    change_tokenizer(folder, post_processor=template)
    message = refused(lambda: Engine.from_pretrained(folder))
    assert "a template of 300 special tokens; wanted at most 256" in message


def test_a_character_map_with_long_replacements(folder):
    def table(replacement):
        raw = (8).to_bytes(4, "little") + bytes(8) + b"a\0" + replacement + b"\0"
        return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}

    tokenizer_file._check(json.dumps({"normalizer": table(b"b" * 256)}).encode(), "tokenizer.json")
    change_tokenizer(folder, normalizer=table(b"b" * 257))
    assert "long replacements" in refused(lambda: Engine.from_pretrained(folder))


def test_limits_of_tokenizers_allow_those_of_real_models():
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
            {"type": "Replace", "pattern": {"String": "''"}, "content": '"'},
            {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]},
    }  # fmt: skip
    tokenizer_file._check(json.dumps(parts).encode(), "tokenizer.json")


# Texts


def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized(folder, monkeypatch):
    engine = Engine.from_pretrained(folder)
    monkeypatch.setattr(engine.tokenizer, "_tokenizer", None)  # any use would fail
    assert "x has 20000000 characters, wanted at most" in refused(lambda: engine.predict("film " * 4_000_000))
    message = refused(lambda: engine.predict(["film", ("a", "film " * 4_000_000)]))
    assert "x[1] has 20000000 characters" in message


def test_a_text_that_is_too_long_is_cut_before_it_is_tokenized(folder):
    engine = Engine.from_pretrained(folder)
    short_text, long = "film game " * 200, "film game " * 100_000
    for first, second in (
        (short_text, long),
        (("good", short_text), ("good", long)),
        ((long, long), (short_text,) * 2),
    ):
        assert engine.predict(first, truncate=True) == engine.predict(second, truncate=True)


def test_a_context_has_a_limit(tmp_path):
    engine = Engine.from_pretrained(write_folder(tmp_path, "ForQuestionAnswering"))
    question = {"question": "who?", "context": "film " * 4_000_000}
    assert "x has 20000000 characters, wanted at most 1048576" in refused(lambda: engine.predict(question))


def test_a_blank_text_without_special_tokens(folder):
    change_tokenizer(folder, post_processor=None)
    engine = Engine.from_pretrained(folder)
    assert "x[1] has no tokens" in refused(lambda: engine.predict(["film", "  "]))
    assert engine.predict("film")["score"] > 0


def test_a_number_of_thousands_of_digits_can_be_named():
    assert short(10**5000) == f"a number of {(10**5000).bit_length()} bits"
    assert short(np.float64(1)).startswith("np")
