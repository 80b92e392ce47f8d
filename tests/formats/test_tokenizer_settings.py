"""tokenizer.json and tokenizer_config.json: the engine reads the first, transformers builds its own by the second."""

import json

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, normalizers

from pruneofa.engine import engine, reference
from pruneofa.engine.engine import Engine
from pruneofa.errors import InputError
from pruneofa.formats.pack import pack
from pruneofa.formats.tokenizer_file import load_tokenizer
from pruneofa.formats.tokenizer_settings import check_same_settings
from tests.tiny import write_folder

UNCASED = {"lowercase": True, "strip_accents": None}


def make(folder, stated, normalizer=UNCASED, **parts):
    """A folder with a BertNormalizer and these settings in tokenizer_config.json; `parts` replace others."""
    write_folder(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    own = json.loads((folder / "tokenizer.json").read_text())
    own["normalizer"] |= normalizer
    (folder / "tokenizer.json").write_text(json.dumps(own | parts))
    return folder


@pytest.mark.parametrize(
    ("stated", "normalizer", "message"),
    [
        (
            {"do_lower_case": False},
            {},
            "do_lower_case is true in tokenizer.json, .* and false in",
        ),
        ({"do_lower_case": True}, {"lowercase": False}, "do_lower_case is false in tokenizer.json, .* and true in"),
        ({"strip_accents": False}, {}, "strip_accents is true in tokenizer.json, .* and false in"),
        ({"strip_accents": None}, {"strip_accents": False}, "strip_accents is false in tokenizer.json, .* and true in"),
        ({"strip_accents": True, "do_lower_case": False}, {"lowercase": False}, "strip_accents is false in"),
        ({"tokenize_chinese_chars": False}, {}, "tokenize_chinese_chars is true in tokenizer.json, .* and false in"),
        # What the class takes for keys that are not there.
        ({"tokenizer_class": "BertTokenizer"}, {"lowercase": False}, "do_lower_case is false in .* and true in"),
        ({"tokenizer_class": "MPNetTokenizer"}, {"strip_accents": False}, "strip_accents is false in .* and true in"),
        (
            {"tokenizer_class": "DistilBertTokenizerFast"},
            {"handle_chinese_chars": False},
            "tokenize_chinese_chars is f",
        ),
    ],
)
def test_settings_that_contradict_tokenizer_json(stated, normalizer, message, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "native", reference)
    folder = make(tmp_path / "model", stated, UNCASED | normalizer)
    for read in (Engine.from_pretrained, lambda path: pack(path, tmp_path / "packed")):
        with pytest.raises(InputError, match=f"model: {message}.*, wanted the same; load .* save_pretrained$") as error:
            read(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stated", "normalizer"),
    [
        ({"do_lower_case": True, "strip_accents": None, "tokenizer_class": "BertTokenizer"}, {}),
        ({"do_lower_case": True, "strip_accents": True}, {}),
        ({"do_lower_case": False, "strip_accents": None}, {"lowercase": False}),
        ({"do_lower_case": True, "strip_accents": False}, {"strip_accents": False}),
        ({"do_lower_case": None, "add_prefix_space": True}, {}),
        ({}, {"lowercase": False, "strip_accents": True, "handle_chinese_chars": False}),
        ({"tokenizer_class": "BertTokenizer"}, {}),
        ({"tokenizer_class": "HerbertTokenizer"}, {"lowercase": False}),  # its class has other defaults
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, {"lowercase": False, "strip_accents": False}),
        # Of these classes transformers reads tokenizer.json too.
        ({"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"}, {}),
        ({"do_lower_case": False, "tokenizer_class": "TokenizersBackend"}, {}),
    ],
)
def test_settings_that_agree_or_say_nothing(stated, normalizer, tmp_path):
    folder = make(tmp_path, stated, UNCASED | normalizer)
    check_same_settings(load_tokenizer(folder / "tokenizer.json"), folder)


def test_special_tokens_that_only_the_class_adds(tmp_path):
    folder = make(tmp_path, {"tokenizer_class": "DistilBertTokenizerFast"}, post_processor=None)
    with pytest.raises(InputError, match="json has no post_processor.*, wanted those of 'DistilBertTokenizerFast' in"):
        check_same_settings(load_tokenizer(folder / "tokenizer.json"), folder)
    for stated in ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        make(folder, stated, post_processor=None)
        check_same_settings(load_tokenizer(folder / "tokenizer.json"), folder)


def test_other_components(tmp_path):
    bytewise = ByteLevelBPETokenizer()._tokenizer
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true, "do_lower_case": true}')
    with pytest.raises(InputError, match="add_prefix_space is false in tokenizer.json, .* and true in"):
        check_same_settings(bytewise, tmp_path)
    spaced = ByteLevelBPETokenizer(add_prefix_space=True)._tokenizer
    check_same_settings(spaced, tmp_path)
    spaced.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    check_same_settings(Tokenizer.from_str(spaced.to_str()), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(InputError, match="do_lower_case is true in tokenizer.json, .* and false in"):
        check_same_settings(spaced, tmp_path)
