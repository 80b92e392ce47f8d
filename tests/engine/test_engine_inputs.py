"""Wrong input to the engine: each kind a named error that says what, got, wanted and what to do. No torch here."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruneofa import Engine
from pruneofa.engine import engine, reference
from pruneofa.engine.load import Weights
from pruneofa.errors import InputError
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import Packed, PackedLinear
from tests.tiny import POSITIONS, VOCABULARY, tiny_roberta, write_folder, write_model


@pytest.fixture(autouse=True)
def _on_the_reference(monkeypatch):
    monkeypatch.setattr(engine, "native", reference)
    monkeypatch.delenv("PRUNEOFA_ISA", raising=False)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """An engine for each head."""
    engines = {}

    def load(head="ForSequenceClassification"):
        if head not in engines:
            engines[head] = Engine.from_pretrained(write_folder(tmp_path_factory.mktemp(head), head))
        return engines[head]

    return load


LAST = len(VOCABULARY) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([[5, LAST + 1]],),
            rf"input_ids\[0, 1\] is {LAST + 1}, wanted 0 to {LAST}: the vocabulary size is {LAST + 1}; use",
        ),
        (([[5, 6], [-1, 6]],), r"input_ids\[1, 0\] is -1, wanted 0 to"),
        ((np.array([[2**40]]),), rf"input_ids\[0, 0\] is {2**40}, wanted"),
        (([5, 6],), r"input_ids has shape \(2,\), wanted \(batch, seq\)"),
        (([[[5]]],), r"input_ids has shape \(1, 1, 1\)"),
        ((np.zeros((0, 4), int),), r"input_ids has shape \(0, 4\), wanted \(batch, seq\), both at least 1"),
        ((np.zeros((4, 0), int),), r"input_ids has shape \(4, 0\)"),
        (([],), r"input_ids has shape \(0,\), wanted"),
        (([[5], [6, 7]],), "input_ids is not a matrix.*pad the rows to one length"),
        (([[5.0]],), "input_ids has dtype float64, wanted integers; convert"),
        (([[True]],), "input_ids has dtype bool, wanted integers"),
        (("the river",), "input_ids has dtype <U9"),
        ((None,), "input_ids has dtype object"),
        (([[5] * (POSITIONS + 1)],), f"row 0 has {POSITIONS + 1} tokens, the model takes at most {POSITIONS}; cut"),
        (([[5, 6]], [[1]]), r"attention_mask has shape \(1, 1\), wanted \(1, 2\), that of input_ids"),
        (([[5, 6]], [1, 1]), r"attention_mask has shape \(2,\), wanted \(1, 2\)"),
        (([[5, 6]], [[1.0, 1.0]]), "attention_mask has dtype float64, wanted integers or bool"),
        (([[5, 6]], [[1, 2]]), "attention_mask has values from 1 to 2, wanted only 0 and 1"),
        (([[5, 6]], [[-1, 1]]), "attention_mask has values from -1 to 1"),
        (([[5, 6], [5, 6]], [[1, 0], [0, 0]]), "attention_mask: row 1 has no token"),
        (([[5, 6]], [[0, 1]]), "row 0 has a 0 before a 1, wanted ones and then zeros; pad on the right"),
        (([[5, 6, 7], [5, 6, 7]], [[1, 1, 1], [1, 0, 1]]), "row 1 has a 0 before a 1"),
        (([[5, 6]], None, [[0]]), r"token_type_ids has shape \(1, 1\), wanted \(1, 2\)"),
        (([[5, 6]], None, [[0, 2]]), r"token_type_ids\[0, 1\] is 2, wanted 0 to 1"),
        (([[5, 6]], None, [[0.0, 1.0]]), "token_type_ids has dtype float64"),
    ],
)
def test_wrong_arrays(loaded, arguments, message):
    with pytest.raises(InputError, match=message):
        loaded().encode(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([[5, 6], [5, LAST + 1]],),
            rf"input_ids\[1, 1\] is {LAST + 1}, wanted 0 to {LAST}: the vocabulary size is {LAST + 1}; use",
        ),
        (([[5, -1]],), r"input_ids\[0, 1\] is -1, wanted 0 to"),
        (([np.array([5, 2**32 + 5])],), rf"input_ids\[0, 1\] is {2**32 + 5}, wanted 0 to"),
        (([np.array([2**64 - 1], np.uint64)],), rf"input_ids\[0, 0\] is {2**64 - 1}, wanted 0 to"),
        (([[5], []],), r"input_ids\[1\] has shape \(0,\), wanted \(tokens,\), at least 1; omit"),
        (([5, 6],), r"input_ids\[0\] has shape \(\), wanted \(tokens,\)"),
        (([[[5]]],), r"input_ids\[0\] has shape \(1, 1\), wanted \(tokens,\)"),
        (([[[5], [6, 7]]],), r"input_ids\[0\] is not an array, wanted"),
        (([[5.0]],), r"input_ids\[0\] has dtype float64, wanted integers; convert"),
        (([[True]],), r"input_ids\[0\] has dtype bool"),
        (
            ([[5], [5] * (POSITIONS + 1)],),
            f"row 1 has {POSITIONS + 1} tokens",
        ),
        (([[5], [6]], [[0]]), "token_type_ids has 1 sequences, input_ids 2; give"),
        (([[5, 6]], [[0]]), r"token_type_ids\[0\] has shape \(1,\), wanted \(2,\), that of input_ids"),
        (([[5, 6]], [[0, 2]]), r"token_type_ids\[0, 1\] is 2"),
        (([[5, 6]], [[0, -1]]), r"token_type_ids\[0, 1\] is -1"),
        (([[5, 6]], [[0.0, 1.0]]), r"token_type_ids\[0\] has dtype float64"),
    ],
)
def test_wrong_sequences(loaded, arguments, message):
    with pytest.raises(InputError, match=message):
        loaded().logits(*arguments)


def test_sequences_of_any_integers_are_the_same(loaded):
    wanted = loaded().logits([np.array([5, 6], np.int32), np.array([7])])
    for ids in ([[5, 6], [7]], [np.array([5, 6], np.uint8), np.array([7], np.uint64)]):
        for got, logits in zip(loaded().logits(ids), wanted, strict=True):
            np.testing.assert_array_equal(got, logits)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "x is an empty list, wanted a str, a pair"),
        ("", "x is an empty string, wanted text"),
        (["good", ""], r"x\[1\] is an empty string"),
        ("a\0b", "x has a NUL character at 1"),
        (["good", "ab\udc80"], r"x\[1\] has a lone surrogate U\+DC80 at 2, wanted valid Unicode; decode"),
        (("good", "\ud800"), r"x\[1\] has a lone surrogate U\+D800 at 0"),
        ((), r"x is a tuple of 0, wanted a pair"),
        (("a", "b", "c"), r"x is a tuple of 3, wanted a pair \(a, b\) of str"),
        (("a", 3), r"x\[1\] is int, wanted a str"),
        ([("a", "")], r"x\[0\]\[1\] is an empty string"),
        (b"good", "x is bytes, wanted a str, a pair"),
        (None, "x is NoneType, wanted"),
        (3, "x is int, wanted"),
        ([["a", "b"]], r"x\[0\] is list, wanted"),
        (iter("ab"), "x is .*iterator, wanted"),
        (np.array(["a"]), "x is ndarray, wanted"),
        ({"question": "a", "context": "b"}, "x is a dict, but the model's task is classification; give a str"),
        ("good " * 63, "x has 65 tokens, the model takes at most 64; shorten it, or pass truncate=True"),
        ([("good " * 31, "bad " * 31)], r"x\[0\] has 65 tokens"),
    ],
)
def test_wrong_texts(loaded, x, message):
    with pytest.raises(InputError, match=message):
        loaded().predict(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("who?", "x is str, but the model's task is question answering; give {'question': ..., 'context': ...}"),
        ([("who", "what")], r"x\[0\] is tuple, but the model's task is question answering"),
        ({}, "x has the keys none; wanted exactly 'question' and 'context'"),
        ({"question": "who?"}, "x has the keys 'question'; wanted exactly"),
        ([{"question": "who?", "context": "a king", "id": 3}], r"x\[0\] has the keys 'question', 'context', 'id'"),
        ({"question": "who?", "context": None}, r"x\['context'\] is NoneType, wanted a str"),
        ({"question": "who?", "context": ""}, r"x\['context'\] is an empty string"),
        ({"question": "", "context": "a king"}, r"x\['question'\] is an empty string"),
        ({"question": "who?", "context": " \n"}, "x: the context has no tokens"),
        (
            {"question": "who " * 50, "context": "a king " * 40},
            "x: the question has 50 tokens, wanted at most 45 beside",
        ),
        ([3], r"x\[0\] is int"),
    ],
)
def test_wrong_questions(loaded, x, message):
    with pytest.raises(InputError, match=message):
        loaded("ForQuestionAnswering").predict(x)


def test_a_long_question_is_cut_when_asked_to(loaded):
    qa = loaded("ForQuestionAnswering")
    context = "a king " * 40
    whole = qa.predict({"question": "who " * 50, "context": context}, truncate=True)
    assert whole == qa.predict({"question": "who " * 45, "context": context})
    assert qa.predict({"question": "who " * 50, "context": "a king"})["answer"]  # there is room


def test_inputs_of_the_other_heads(loaded):
    with pytest.raises(InputError, match=r"x\[1\] has no \[MASK\], wanted at least one"):
        loaded("ForMaskedLM").predict(["the [MASK]", "the river"])
    for text in ("the [MASK]" + " river" * 100 + " [MASK]", ("the [MASK] river", "river " * 100 + "[MASK]")):
        with pytest.raises(InputError, match=r"x\[0\] has 1 of its 2 \[MASK\] behind the 64 tokens"):
            loaded("ForMaskedLM").predict([text], truncate=True)
    with pytest.raises(
        InputError, match="x is a tuple, but the model's task is token classification; give single texts"
    ):
        loaded("ForTokenClassification").predict(("a", "b"))
    assert loaded("ForTokenClassification").predict(" ") == []  # no token, no class
    assert loaded("Model").predict(" ").shape == (32,)  # the special tokens have hidden states


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, None])
def test_wrong_batch_sizes(loaded, batch_size):
    with pytest.raises(InputError, match="batch_size is .*, wanted an integer of at least 1"):
        loaded().predict("good", batch_size=batch_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads is 0, wanted an integer from 1 to 1024, or None to count"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 2.0}, "threads is 2.0"),
        ({"threads": True}, "threads is True"),
        ({"threads": 10**9}, "threads is 1000000000"),
        ({"precision": "bf16"}, "precision is 'bf16', wanted 'int8' or 'fp32'"),
        ({"isa": "amx"}, "isa is 'amx', which this CPU does not run; wanted one of scalar"),
        ({"isa": ""}, "isa is '', which"),
        ({"isa": 3}, "isa is 3, which"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Engine.from_pretrained(tmp_path, **arguments)  # seen before anything is read


def test_the_environment_names_an_isa_the_cpu_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEOFA_ISA", "neon")
    with pytest.raises(InputError, match="PRUNEOFA_ISA is 'neon', which this CPU does not run; wanted one of scalar"):
        Engine.from_pretrained(write_folder(tmp_path))
    assert Engine.from_pretrained(tmp_path, isa="scalar").isa == "scalar"


def test_an_extension_that_was_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "native", None)
    monkeypatch.setattr(engine, "_not_built", "no module", raising=False)
    with pytest.raises(ImportError, match="native extension of pruneofa is missing .* pip install"):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", [None, 3, b"folder"])
def test_paths_of_the_wrong_type(path):
    with pytest.raises(InputError, match="wanted a folder's path or a hub id"):
        Engine.from_pretrained(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "swish"}, "activation 'swish' in config.json, wanted one of gelu, gelu_new"),
        ({"hidden_act": ["gelu"]}, r"activation \['gelu'\]"),
        (
            {"architectures": ["BertForNextSentencePrediction"]},
            "architecture 'BertForNextSentencePrediction'.*wanted one of",
        ),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'.*wanted 'absolute'"),
        ({"is_decoder": True}, "describes a decoder"),
        ({"num_attention_heads": 5}, "hidden size 32 in config.json is not divisible by 5 heads"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0 in config.json, wanted an integer of at least 1"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 64}, "has shape .*, config.json wants .*; copy the config.json that was saved"),
        ({"intermediate_size": 32}, "intermediate.dense.weight has shape 64x32, config.json wants 32x32"),
        ({"num_hidden_layers": 3}, "no tensor encoder.layer.2.attention.self.query.weight"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"vocab_size": 160}, "word_embeddings.weight has shape 165x32, config.json wants 160x32"),
        ({"max_position_embeddings": 40}, "position_embeddings.weight has shape 64x32, config.json wants 40x32"),
        ({"type_vocab_size": 3}, "token_type_embeddings.weight has shape 2x32, config.json wants 3x32"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking' in config.json, wanted one of regression"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label in config.json is"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label in config.json gives the name 'a' to 2 classes"),
        ({"id2label": {"0": "a"}}, "the classifier has 3 classes, id2label in config.json has 1"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        (
            {"model_type": "roberta"},
            "model_type 'roberta' but architecture BertForSequenceClassification, which is",
        ),
        ({"hidden_act": "x" * 5000}, "activation 'x+... in config.json"),
        ({"position_embedding_type": "\ud800\n" * 900}, r"position_embedding_type is '.ud800.n.*\.\.\. in config.json"),
        ({"hidden_size": [0] * 5000}, r"hidden_size is \[0, .*\.\.\. in config.json"),
        ({"layer_norm_eps": "9" * 5000}, "layer_norm_eps is '9+... in config.json"),
        ({"problem_type": "x" * 5000}, "problem_type is 'x+... in config.json"),
    ],
)
def test_configs_the_engine_does_not_run(config, message, tmp_path):
    write_folder(tmp_path, **config)
    with pytest.raises(InputError, match=message) as caught:
        Engine.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


def test_a_layer_that_is_too_wide_for_the_kernels_is_named(tmp_path):
    wide = PackedLinear((1, 2**17), np.zeros((1, 2**14), np.uint8), np.zeros(0, np.int8), np.ones(1, np.float32))
    name = "encoder.layer.0.output.dense"
    packed = Packed(
        folder=tmp_path,
        config={},
        precision="int8",
        input_scales=None,
        quantized=False,
        linears={f"{name}.weight": wide},
        embeddings={},
        plain={f"{name}.bias": np.zeros(1, np.float32)},
    )
    with pytest.raises(InputError, match=f"{name}.weight: 131072 inputs, wanted at most 65535; use a narrower model"):
        Weights(packed, reference, "scalar").linear(name)


def test_positions_that_begin_behind_their_table(tmp_path):
    folder = write_model(tmp_path / "folder", tiny_roberta())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 1000}))
    told = "config.json has pad_token_id 1000, so positions begin at 1001, wanted less than the .* rows of their table"
    with pytest.raises(InputError, match=told):
        Engine.from_pretrained(folder)
    with pytest.raises(InputError, match=told):
        pack(folder, tmp_path / "packed")


def test_windows_without_room_for_a_token(tmp_path):
    tokenizer = Engine.from_pretrained(write_folder(tmp_path, "ForTokenClassification")).tokenizer
    tokenizer.limit = 2
    with pytest.raises(InputError, match="a: no window of 2 tokens, which the model takes, has room beside 2 special"):
        tokenizer.text_windows(["the king"], ["a"])


def test_a_task_without_its_weights(tmp_path):
    write_folder(tmp_path, "Model", architectures=["BertForQuestionAnswering"])
    with pytest.raises(
        InputError, match=r"no tensor qa_outputs.weight, which BertForQuestionAnswering has; .*fine-tuned"
    ):
        Engine.from_pretrained(tmp_path)


def test_a_config_without_architectures_is_a_bare_encoder(tmp_path):
    assert Engine.from_pretrained(write_folder(tmp_path, "Model", architectures=None)).task == "embedding"


def test_tokenizers_that_are_missing_broken_or_of_another_model(tmp_path):
    write_folder(tmp_path)
    tokenizer = tmp_path / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text[:-9])
    with pytest.raises(InputError, match=r"tokenizer.json: not a usable tokenizer \("):
        Engine.from_pretrained(tmp_path)
    tokenizer.unlink()
    with pytest.raises(InputError, match="no tokenizer.json"):
        Engine.from_pretrained(tmp_path)
    tokenizer.write_text(text)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"] = weights["bert.embeddings.word_embeddings.weight"][:10].copy()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    with pytest.raises(InputError, match=r"165 tokens with ids up to 164, but the model has 10 word embeddings"):
        Engine.from_pretrained(tmp_path)


def test_int8_cannot_be_asked_for_float_weights(tmp_path):
    pack(write_folder(tmp_path / "folder"), tmp_path / "packed", precision="int8")
    with pytest.raises(InputError, match="packed as int8, but precision='fp32' was requested; omit it, or pack"):
        Engine.from_pretrained(tmp_path / "packed", precision="fp32")


def test_a_mask_token_that_no_tokenizer_can_know(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "\ud800"}))
    assert "label" in Engine.from_pretrained(tmp_path).predict("a good film")


def test_a_masked_lm_with_two_biases_of_its_decoder(tmp_path):
    folder = write_folder(tmp_path, "ForMaskedLM")
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].copy()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    Engine.from_pretrained(folder)
    weights["cls.predictions.decoder.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"^/.*: cls.predictions.bias and cls.predictions.decoder.bias differ, want"):
        Engine.from_pretrained(folder)


def test_a_manifest_of_something_else_beside_a_model(tmp_path):
    folder = write_folder(tmp_path)
    wanted = Engine.from_pretrained(folder).predict("a good film")
    (folder / "manifest.json").write_text('{"name": "my web app"}')
    assert Engine.from_pretrained(folder).predict("a good film") == wanted


def test_a_folder_that_has_models_in_it_names_them(tmp_path):
    write_folder(tmp_path / "run" / "sparse")
    for read in (Engine.from_pretrained, lambda path: pack(path, tmp_path / "packed")):
        with pytest.raises(InputError, match=r"run: no model.safetensors in it; wanted .*, such as .*/run/sparse$"):
            read(tmp_path / "run")


def test_one_class_is_a_sigmoid_whatever_the_config_says(tmp_path):
    """As in the pipeline of transformers; a softmax over one class would be 1 for every text."""
    wanted = Engine.from_pretrained(write_folder(tmp_path / "a", labels=1)).predict("a good film")
    stated = write_folder(tmp_path / "b", labels=1, problem_type="single_label_classification")
    assert Engine.from_pretrained(stated).predict("a good film") == wanted and 0 < wanted["score"] < 1
