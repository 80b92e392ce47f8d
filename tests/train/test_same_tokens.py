"""The tokenizer of training is the tokenizer of the engine: the same ids and token types, or one line that says why."""

import json
import shutil

import pytest
from tokenizers import AddedToken, ByteLevelBPETokenizer, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, RobertaTokenizerFast

from pruneofa.engine.tokenizer import TextTokenizer
from pruneofa.errors import InputError
from pruneofa.train.models import load_tokenizer
from tests.tiny import (
    POSITIONS,
    VOCABULARY,
    tiny_bert,
    tiny_distilbert,
    tiny_mpnet,
    tiny_roberta,
    write_model,
    write_tokenizer,
)

PAIR = ("the King of 10 cities", "a good river")
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}


def changed(folder, own=None, **stated):
    """The folder with other settings in tokenizer_config.json, where None takes a key away, and in tokenizer.json."""
    for name, fields in (("tokenizer_config.json", stated), ("tokenizer.json", own or {})):
        whole = json.loads((folder / name).read_text()) | fields
        for key in [key for key, value in fields.items() if value is None and name == "tokenizer_config.json"]:
            del whole[key]
        (folder / name).write_text(json.dumps(whole))
    return folder


def own(folder):
    return json.loads((folder / "tokenizer.json").read_text())


def given(tokenizer):
    """Ids and token types of the pair by transformers, zeros where it gives none."""
    encoded = tokenizer(*PAIR)
    return encoded["input_ids"], encoded.get("token_type_ids", [0] * len(encoded["input_ids"]))


def served(folder, types):
    """Ids and token types of the pair in the engine."""
    engines = TextTokenizer(folder, vocabulary=len(VOCABULARY), types=types, limit=POSITIONS)
    (tokens,) = engines.sequences([PAIR], ["x"], truncate=False)
    return tokens.ids.tolist(), tokens.types.tolist()


@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize(
    "stated",
    [
        {},
        GENERIC,
        {"tokenizer_class": "DistilBertTokenizer"},
        {"model_input_names": ["input_ids", "attention_mask"]},
        {**GENERIC, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
    ],
)
def test_token_types_are_those_of_the_engine_also_when_saved(stated, types, tmp_path):
    folder = changed(write_model(tmp_path / "m", tiny_bert(type_vocab_size=types)), **stated)
    tokenizer = load_tokenizer(folder)
    ids, kinds = served(folder, types)
    assert given(tokenizer) == (ids, kinds)
    untyped = "DistilBertTokenizer" in stated.values() or "token_type_ids" not in stated.get(
        "model_input_names", ["token_type_ids"]
    )
    assert max(kinds) == (types == 2 and not untyped)
    saved = shutil.copytree(folder, tmp_path / "saved")
    tokenizer.save_pretrained(saved)
    assert given(AutoTokenizer.from_pretrained(saved)) == served(saved, types) == (ids, kinds)
    assert given(load_tokenizer(saved)) == (ids, kinds)


@pytest.mark.parametrize(("make", "said"), [(tiny_bert, False), (tiny_distilbert, True), (tiny_roberta, True)])
def test_only_what_the_class_does_otherwise_is_saved(make, said, tmp_path):
    load_tokenizer(write_model(tmp_path / "m", make())).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert ("model_input_names" in saved) == said  # BERT's tokenizer gives types to models without any


def test_a_teacher_with_token_types_needs_a_student_that_is_served_with_them(tmp_path):
    folder = changed(write_model(tmp_path / "m"), model_input_names=["input_ids", "attention_mask"])
    with pytest.raises(InputError, match="m: model_input_names is .*, so the engine gives it no token types, wanted"):
        load_tokenizer(folder, types=True)
    assert "token_type_ids" in load_tokenizer(write_model(tmp_path / "d", tiny_distilbert()), types=True)("a", "b")
    assert max(given(load_tokenizer(changed(write_model(tmp_path / "g"), **GENERIC), types=True))[1]) == 1


@pytest.mark.parametrize("make", [tiny_bert, tiny_distilbert, tiny_roberta, tiny_mpnet])
def test_ordinary_folders(make, tmp_path):
    folder = write_model(tmp_path, make())
    load_tokenizer(folder)
    load_tokenizer(changed(folder, model_max_length=10**30, **GENERIC))


def test_a_tokenizer_that_cuts_and_pads(tmp_path):
    folder = write_model(tmp_path)
    write_tokenizer(folder)
    assert given(load_tokenizer(folder)) == served(folder, 2)


@pytest.mark.parametrize("stated", [{}, {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}])
def test_an_ordinary_folder_of_byte_pairs(stated, tmp_path):
    tiny_roberta(pad_token_id=1).save_pretrained(tmp_path)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, *sorted(ByteLevel.alphabet())[: len(VOCABULARY) - 5]]
    made = ByteLevelBPETokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    made.add_special_tokens([*special, AddedToken("<mask>", lstrip=True)])
    made._tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64} | stated))
    assert isinstance(load_tokenizer(tmp_path), RobertaTokenizerFast)
    changed(tmp_path, add_prefix_space=True)
    with pytest.raises(InputError, match="add_prefix_space is false in tokenizer.json, .* and true in"):
        load_tokenizer(tmp_path)


def cased(folder):
    changed(folder, {"normalizer": own(folder)["normalizer"] | {"lowercase": False}}, do_lower_case=None)


def without_special_tokens(folder):
    changed(folder, {"post_processor": None}, tokenizer_class=None)


def with_a_special_token(folder):
    changed(folder, extra_special_tokens=["##ing"])


def typed_otherwise(folder):
    parts = own(folder)["post_processor"]
    pair = json.loads(json.dumps(parts["pair"]).replace('"type_id": 1', '"type_id": 0'))
    changed(folder, {"post_processor": parts | {"pair": pair}}, **GENERIC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cased, r"m: do_lower_case is false in tokenizer.json, .* and true in tokenizer_config.json"),  # by default
        (without_special_tokens, r"the ids of 'Hello WORLD' are \[\d+, .*\], by .* wanted \[2, .*, 3\], which"),
        (with_a_special_token, r"the ids of 'the ##ing city' are "),
    ],
)
def test_other_ids_than_those_of_tokenizer_json(change, message, tmp_path):
    folder = write_model(tmp_path / "m")
    change(folder)
    with pytest.raises(InputError, match=f"{message}.*; load the tokenizer in transformers and save it") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and str(error.value).isascii()
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # what the line says
    assert given(load_tokenizer(folder)) == served(folder, 2)


def test_a_template_that_gives_both_texts_one_type_gives_it_in_training_too(tmp_path):
    folder = write_model(tmp_path / "m")
    typed_otherwise(folder)
    assert given(load_tokenizer(folder)) == served(folder, 2)
    changed(folder, tokenizer_class="BertTokenizer")
    assert max(given(AutoTokenizer.from_pretrained(folder))[1]) == 1
    with pytest.raises(InputError, match=r"the token types of the pair \('One text\.', 'Another one'\) are \[0, 0"):
        load_tokenizer(folder)
