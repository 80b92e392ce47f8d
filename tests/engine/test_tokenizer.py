"""Sequences, and windows, with tokenizers of both kinds: WordPiece and byte-level."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import RobertaProcessing

from pruneofa.engine.tokenizer import TextTokenizer
from pruneofa.errors import InputError
from tests.tiny import write_tokenizer

CONTEXT = "Žluťoučký kůň 😀 ran over the river. " * 8


@pytest.fixture
def byte_level(tmp_path):
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False, trim_offsets=True)
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    tokenizer.train_from_iterator([CONTEXT], vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<mask>", "lstrip": True}}))
    return tmp_path


def test_windows_cover_the_context_and_point_into_it(byte_level):
    tokenizer = TextTokenizer(byte_level, vocabulary=1000, types=1, limit=40)
    windows = tokenizer.windows([("who ran?", "a kůň"), ("what?", CONTEXT)], ["x", "y"], truncate=False)
    owners = [window.text for window in windows]
    assert owners[0] == 0 and set(owners[1:]) == {1} and len(owners) > 3
    whole = Tokenizer.from_file(str(byte_level / "tokenizer.json")).encode("what?", CONTEXT)
    starts = [index for index, segment in enumerate(whole.sequence_ids) if segment == 1]
    seen = set()
    for window in windows[1:]:
        inside = window.segments == 1
        assert len(window.ids) <= 40 and window.ids[0] == 0 and window.ids[-1] == 2 and not window.types.any()
        assert np.count_nonzero(window.segments == 0) == whole.sequence_ids.count(0)
        seen |= {tuple(chars) for chars in window.chars[inside].tolist()}
    assert seen == {whole.offsets[index] for index in starts}
    assert min(seen)[0] == 0 and max(seen)[1] >= len(CONTEXT) - 1  # a space at the end is trimmed


def test_windows_share_tokens(byte_level):
    tokenizer = TextTokenizer(byte_level, vocabulary=1000, types=1, limit=512)
    first, second, *_ = tokenizer.windows([("what?", CONTEXT * 9)], ["x"], truncate=False)
    assert len(first.ids) == 384
    np.testing.assert_array_equal(first.ids[first.segments == 1][-128:], second.ids[second.segments == 1][:128])


def test_special_tokens_come_from_the_folder(byte_level, tmp_path):
    assert TextTokenizer(byte_level, vocabulary=1000, types=1, limit=64).mask_id == 3
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    assert TextTokenizer(tmp_path, vocabulary=1000, types=2, limit=64).mask_id == 4  # by its usual name


def test_the_advice_for_a_folder_without_tokenizer_json(tmp_path):
    def said():
        with pytest.raises(InputError, match=r"no tokenizer\.json in it, which the engine needs") as caught:
            TextTokenizer(tmp_path, vocabulary=1000, types=2, limit=64)
        return str(caught.value)

    assert "AutoTokenizer" not in said()  # it would make a vocabulary up
    assert "nor vocab.txt to make it from; copy tokenizer.json" in said()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    assert "write it with: python -c" in said()
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    assert "nor vocab.json and merges.txt" in said()
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    assert "write it with: python -c" in said()


def test_settings_that_are_no_object(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="tokenizer_config.json: wanted a JSON object, got list"):
        TextTokenizer(tmp_path, vocabulary=1000, types=2, limit=64)


def test_token_types_only_where_the_model_has_them(tmp_path):
    write_tokenizer(tmp_path)
    pair = [("good", "bad river")]
    types = {}
    for count in (0, 1, 2):
        types[count] = (
            TextTokenizer(tmp_path, vocabulary=1000, types=count, limit=64)
            .sequences(pair, ["x"], truncate=False)[0]
            .types
        )
    assert types[2].tolist() == [0, 0, 0, 1, 1, 1]
    assert not types[0].any() and not types[1].any()
    for name in ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer", "RobertaTokenizerFast"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        found = TextTokenizer(tmp_path, vocabulary=1000, types=2, limit=64).sequences(pair, ["x"], truncate=False)[0]
        assert found.types.any() == ("token_type_ids" in getattr(transformers, name).model_input_names)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_input_names": ["input_ids", "attention_mask"]}))
    tokenizer = TextTokenizer(tmp_path, vocabulary=1000, types=2, limit=64)
    assert not tokenizer.sequences(pair, ["x"], truncate=False)[0].types.any()


@pytest.mark.parametrize("stated", [{"truncation_side": "left"}, {}])
def test_texts_are_cut_at_the_side_that_the_folder_says(stated, tmp_path):
    """tokenizer_config.json, and without it there tokenizer.json, as in transformers."""
    write_tokenizer(tmp_path)
    own = json.loads((tmp_path / "tokenizer.json").read_text())
    own["truncation"]["direction"] = "Right" if stated else "Left"
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated | {"tokenizer_class": "BertTokenizer"}))
    text = "the great river of the good king"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = TextTokenizer(tmp_path, vocabulary=1000, types=2, limit=5)
    assert tokenizer.side == theirs.truncation_side == "left"
    [cut] = tokenizer.sequences([text], ["x"], truncate=True)
    assert cut.ids.tolist() == theirs(text, truncation=True, max_length=5)["input_ids"]
    [other] = tokenizer.sequences([text], ["x"], truncate=True, side="right")
    assert other.ids.tolist() != cut.ids.tolist()
    (tmp_path / "tokenizer_config.json").write_text('{"truncation_side": "middle"}')
    with pytest.raises(InputError, match="truncation_side is 'middle' in tokenizer_config.json, wanted left or right"):
        TextTokenizer(tmp_path, vocabulary=1000, types=2, limit=5)
