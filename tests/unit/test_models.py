import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.run.stages import check_vocabulary
from pruneofa.train.models import (
    load_config,
    load_for_pretraining,
    model_fingerprint,
    reorder_classes,
    set_dropout,
    with_safetensors,
)
from tests.small import write_model
from tests.tiny import tiny_bert, tiny_distilbert, tiny_roberta


def test_a_missing_head_is_created_on_tied_embeddings(tmp_path):
    model = load_for_pretraining(str(write_model(tmp_path / "m", tiny_bert(BertModel))), nsp=True)
    assert isinstance(model, BertForPreTraining)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("make", [tiny_distilbert, tiny_roberta])
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


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="model_type is 'gpt2', wanted one of bert, distilbert, roberta"):
        load_config(str(tmp_path))


def test_fingerprint_is_of_content_and_includes_the_tokenizer(tmp_path):
    a, b = (write_model(tmp_path / name, tiny_bert()) for name in "ab")
    assert model_fingerprint(str(a)) == model_fingerprint(str(b))
    with open(b / "tokenizer.json", "a") as file:
        file.write(" ")
    assert model_fingerprint(str(a)) != model_fingerprint(str(b))


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
    with pytest.raises(InputError, match="its vocabulary .* is not that of"):
        check_vocabulary(str(a), str(b))


def test_a_bin_is_converted_once_weights_only(tmp_path):
    source = write_model(tmp_path / "m", tiny_bert())
    weights = load_file(source / "model.safetensors")
    assert with_safetensors(str(source)) == str(source)
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    copy = with_safetensors(str(source))
    assert copy != str(source) and with_safetensors(copy) == copy
    assert pattern.inspect(copy)["weights"] > 0
    for name, weight in load_file(f"{copy}/model.safetensors").items():
        assert torch.equal(weight, weights[name])


def test_a_bin_that_is_code_is_not_run(tmp_path):
    source = write_model(tmp_path / "m", tiny_bert())
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(InputError, match="holds more than weights and could run code"):
        with_safetensors(str(source))
    assert not (tmp_path / "exploded").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))
