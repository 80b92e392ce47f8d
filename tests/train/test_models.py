import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    RobertaTokenizerFast,
)

from pruneofa import Engine
from pruneofa.errors import InputError
from pruneofa.export.source import read_source
from pruneofa.run.checks import check_vocabulary
from pruneofa.train.evaluate import load_task_model
from pruneofa.train.models import (
    load_config,
    load_for_pretraining,
    load_for_task,
    load_tokenizer,
    model_fingerprint,
    reorder_classes,
    set_dropout,
)
from tests.tiny import (
    VOCABULARY,
    modules_json,
    tiny_bert,
    tiny_distilbert,
    tiny_mpnet,
    tiny_roberta,
    tiny_tokenizer,
    write_model,
)


def test_a_missing_head_is_created_on_tied_embeddings(tmp_path):
    model = load_for_pretraining(str(write_model(tmp_path / "m", tiny_bert(BertModel))), nsp=True)
    assert isinstance(model, BertForPreTraining)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("make", [tiny_distilbert, tiny_roberta, tiny_mpnet])
def test_architectures_without_next_sentence_head(tmp_path, make):
    path = str(write_model(tmp_path / "m", make()))
    assert load_for_pretraining(path, nsp=False, trained_head=True).get_output_embeddings() is not None
    with pytest.raises(InputError, match="has no next-sentence head; set corpus.nsp=false"):
        load_for_pretraining(path, nsp=True)


def test_bert_without_nsp_keeps_a_pooler_that_is_there_and_invents_none(tmp_path):
    source = tiny_bert(BertForPreTraining)
    kept = load_for_pretraining(str(write_model(tmp_path / "a", source)), nsp=False)
    assert torch.equal(kept.bert.pooler.dense.weight, source.bert.pooler.dense.weight)
    none = load_for_pretraining(str(write_model(tmp_path / "b", tiny_bert(BertForMaskedLM))), nsp=False)
    assert isinstance(none, BertForMaskedLM) and none.bert.pooler is None


@pytest.mark.parametrize(
    "before",
    [
        {"problem_type": "regression"},
        {"problem_type": "multi_label_classification"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
    ],
)
def test_scores_of_the_task_before_do_not_become_those_of_the_new_one(tmp_path, before):
    path = write_model(tmp_path / "m", tiny_bert(BertForSequenceClassification, num_labels=1, **before))
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    write_model(tmp_path / "new", load_for_task(str(path), "classification", num_labels=2, **names))
    (answer,) = Engine.from_pretrained(tmp_path / "new", precision="fp32", threads=1).predict(["a good film"])
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_a_head_that_must_be_trained(tmp_path):
    path = str(write_model(tmp_path / "m", tiny_bert(BertModel)))
    with pytest.raises(InputError, match="its pre-training head is missing .* add a teacher stage"):
        load_for_pretraining(path, nsp=True, trained_head=True)


def test_missing_encoder_weights_are_named(tmp_path):
    path = write_model(tmp_path / "m", tiny_bert(BertModel, num_hidden_layers=1))
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    with pytest.raises(InputError, match=r"encoder weights are missing, such as .*layer\.1"):
        load_for_pretraining(str(path), nsp=True)


def pad_words(path):
    change_weights(path, "word_embeddings.weight", lambda weight: torch.cat([weight, weight[:3]]))


def more_positions(path):
    change_config(path, max_position_embeddings=72)


def cut_heads(path):
    change_weights(path, "layer.1.attention.self.query.weight", lambda weight: weight[:16])


def cut_ffn(path):
    change_weights(path, "layer.1.intermediate.dense.weight", lambda weight: weight[:48])


def change_weights(path, ending, change):
    weights = load_file(path / "model.safetensors")
    [name] = [name for name in weights if name.endswith(ending)]
    save_file(weights | {name: change(weights[name]).contiguous()}, path / "model.safetensors", {"format": "pt"})


def change_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (pad_words, r"word_embeddings.weight: the file has shape \(168, 32\), config.json wants \(165, 32\)"),
        (more_positions, r"position_embeddings.weight: the file has shape \(64, 32\), config.json wants \(72, 32\)"),
        (
            cut_heads,
            r"layer.1.attention.self.query.weight: the file has shape \(16, 32\), config.json wants \(32, 32\)",
        ),
        (cut_ffn, r"layer.1.intermediate.dense.weight: the file has shape \(48, 32\), config.json wants \(64, 32\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(tmp_path, damage, named):
    path = write_model(tmp_path / "m", tiny_bert(BertForSequenceClassification))
    damage(path)
    readers = [
        lambda: load_for_task(str(path), "classification", num_labels=3),
        lambda: load_for_task(str(path), "qa"),
        lambda: load_for_pretraining(str(path), nsp=True),
        lambda: load_task_model(path, "classification"),  # of evaluation, and every teacher
        lambda: read_source(path, int8=False, whole=False),
    ]
    for read in readers:
        with pytest.raises(InputError, match=f"{named}; copy the config.json") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_head_may_be_new_or_of_another_size_only_for_training(tmp_path):
    path = write_model(tmp_path / "m", tiny_bert(BertForSequenceClassification, num_labels=3))
    assert load_for_task(str(path), "classification", num_labels=2).classifier.out_features == 2
    assert isinstance(load_for_task(str(path), "qa"), BertForQuestionAnswering)
    change_weights(path, "classifier.weight", lambda weight: weight[:2])
    with pytest.raises(InputError, match=r"classifier.weight: the file has shape \(2, 32\)"):
        load_task_model(path, "classification")


def test_a_pooler_may_be_missing_but_not_of_another_size(tmp_path):
    without = write_model(tmp_path / "a", tiny_bert(BertForMaskedLM))
    assert load_for_task(str(without), "classification").bert.pooler is not None
    path = write_model(tmp_path / "b", tiny_bert(BertModel))
    change_weights(path, "pooler.dense.weight", lambda weight: weight[:16])
    with pytest.raises(InputError, match=r"pooler.dense.weight: the file has shape \(16, 32\)"):
        load_for_task(str(path), "classification")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    model = tiny_bert(BertForSequenceClassification)
    name = "bert.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, :2] = value
    path = write_model(tmp_path / "m", model)
    for load in (lambda: load_for_pretraining(str(path), nsp=True), lambda: load_task_model(path, "classification")):
        with pytest.raises(InputError, match=rf"model .*m: {name} has 2 NaN or infinite values; wanted finite numbers"):
            load()


def test_missing_encoder_weights_of_a_task_model(tmp_path):
    path = write_model(tmp_path / "m", tiny_bert(BertForSequenceClassification, num_hidden_layers=1))
    change_config(path, num_hidden_layers=2)
    for read in (
        lambda: load_task_model(path, "classification"),
        lambda: read_source(path, int8=False, whole=False),
    ):
        with pytest.raises(InputError, match=r"such as bert.encoder.layer.1.*wants shape \(32,\)"):
            read()


@pytest.mark.parametrize(
    ("make", "wanted"),
    [(tiny_bert, "vocab.txt"), (tiny_distilbert, "vocab.txt"), (tiny_roberta, "merges.txt and vocab.json")],
)
def test_a_folder_without_tokenizer_files(tmp_path, make, wanted):
    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"got neither tokenizer.json nor {wanted}, wanted .*; copy the") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_files_of_a_slow_tokenizer_are_enough(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    ordered = sorted(tiny_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    (tmp_path / "bert/vocab.txt").write_text("\n".join(piece for piece, _ in ordered) + "\n")
    assert load_tokenizer(str(tmp_path / "bert")).get_vocab() == tiny_tokenizer().get_vocab()
    tiny_roberta().save_pretrained(tmp_path / "roberta")
    shutil.copy(tmp_path / "bert/vocab.txt", tmp_path / "roberta")  # RoBERTa's class does not read it
    with pytest.raises(InputError, match="nor merges.txt and vocab.json"):
        load_tokenizer(str(tmp_path / "roberta"))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b"]
    (tmp_path / "roberta/vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (tmp_path / "roberta/merges.txt").write_text("#version: 0.2\n")
    tokenizer = load_tokenizer(str(tmp_path / "roberta"))
    assert isinstance(tokenizer, RobertaTokenizerFast) and len(tokenizer) == 7


def test_a_link_to_no_file_is_not_a_missing_tokenizer(tmp_path):
    path = write_model(tmp_path / "m")
    (path / "vocab.txt").write_text("\n".join(VOCABULARY))  # from which transformers would make another one
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to("nothing")
    with pytest.raises(InputError, match="m/tokenizer.json: not a regular file; copy the file again"):
        load_tokenizer(path)


def test_tokens_added_without_word_embeddings(tmp_path):
    path = write_model(tmp_path)
    tokenizer = load_tokenizer(str(path))
    tokenizer.add_tokens(["zebra", "gnu"])
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="167 tokens with ids up to 166, .* vocab_size 165, .*embeddings not resized"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("make", [tiny_bert, tiny_distilbert, tiny_roberta, tiny_mpnet])
def test_a_model_of_one_token_type_gets_none(tmp_path, make):
    config = {"type_vocab_size": 1} if make is tiny_bert else {}
    path = str(write_model(tmp_path / "m", make(**config)))
    tokenizer = load_tokenizer(path)
    assert "token_type_ids" not in tokenizer("the king", "a river")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "saved")("the king", "a river")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_one_token_type_is_too_few_for_next_sentences(tmp_path):
    path = str(write_model(tmp_path / "m", tiny_bert(type_vocab_size=1)))
    with pytest.raises(InputError, match=r"corpus.nsp is true but .*/m has 1 token type, wanted 2; set"):
        load_for_pretraining(path, nsp=True)
    load_for_pretraining(path, nsp=False)


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="model_type is 'gpt2', wanted one of bert"):
        load_config(str(tmp_path))


def test_fingerprint_is_of_content_and_includes_the_tokenizer(tmp_path):
    a, b = (write_model(tmp_path / name, tiny_bert()) for name in "ab")
    assert model_fingerprint(str(a)) == model_fingerprint(str(b))
    with open(b / "tokenizer.json", "a") as file:
        file.write(" ")
    assert model_fingerprint(str(a)) != model_fingerprint(str(b))


def test_fingerprint_includes_the_settings_of_sentence_transformers(tmp_path):
    folder = write_model(tmp_path / "model", tiny_bert())
    modules = modules_json()
    (folder / "1_Pooling").mkdir()
    found = [model_fingerprint(str(folder))]
    for name, text in (
        ("modules.json", json.dumps(modules)),
        ("1_Pooling/config.json", '{"pooling_mode": "cls"}'),
        ("1_Pooling/config.json", '{"pooling_mode": "mean"}'),
        ("sentence_bert_config.json", '{"max_seq_length": 12}'),
        ("config_sentence_transformers.json", "{}"),
    ):
        (folder / name).write_text(text)
        found.append(model_fingerprint(str(folder)))
    assert len(set(found)) == len(found)
    (folder / "modules.json").write_text(json.dumps(modules_json(Dense="2_Dense")))  # its settings are not kept
    assert model_fingerprint(str(folder)) == found[0]


def test_set_dropout_leaves_the_config_alone():
    model = tiny_bert(hidden_dropout_prob=0.1)
    set_dropout(model, 0.0)
    assert model.config.hidden_dropout_prob == 0.1
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_reordered_classes_permute_the_logits():
    model = tiny_bert(BertForSequenceClassification, num_labels=3).eval()
    ids = torch.tensor([[2, 7, 8, 3]])
    before = model(ids).logits
    reorder_classes(model, [2, 0, 1])
    torch.testing.assert_close(model(ids).logits, before[:, [2, 0, 1]])


def test_another_vocabulary_is_refused(tmp_path):
    a, b = (write_model(tmp_path / name, tiny_bert()) for name in "ab")
    check_vocabulary(str(a), str(b))
    tokenizer = (b / "tokenizer.json").read_text()
    (b / "tokenizer.json").write_text(tokenizer.replace('"river"', '"rivre"'))
    with pytest.raises(InputError, match="its vocabulary .* differs from that of"):
        check_vocabulary(str(a), str(b))
