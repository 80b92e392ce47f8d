"""Tensors that nothing would compute: a head that config.json does not name, additions to the encoder layers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from pruneofa.errors import InputError
from pruneofa.export.export import export
from pruneofa.formats.pack import pack
from pruneofa.train.models import load_for_task
from tests.tiny import tiny_bert, write_model

ADDED = "bert.encoder.layer.1.output.adapters.mine.adapter_down.0.weight"


@pytest.mark.parametrize("named", [None, ["BertModel"]])
@pytest.mark.parametrize("head", [BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering])
def test_a_trained_head_that_config_json_does_not_name(tmp_path, head, named):
    folder = write_model(tmp_path / "model", tiny_bert(head))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": named}))
    with pytest.raises(InputError, match=r"a trained head that config\.json does not name, .*BertForSequenceClassifi"):
        pack(folder, tmp_path / "packed")
    (folder / "config.json").write_text(json.dumps(config))
    pack(folder, tmp_path / "packed")


def test_additions_to_the_layers(tmp_path):
    folder = write_model(tmp_path / "model", tiny_bert(BertForSequenceClassification))
    file = folder / "model.safetensors"
    save_file(load_file(file) | {ADDED: torch.zeros(4, 32)}, file, {"format": "pt"})
    message = rf"1 tensors, such as {ADDED.removeprefix('bert.')}, are in encoder layers but not computed"
    with pytest.raises(InputError, match=message):
        pack(folder, tmp_path / "packed")
    with pytest.raises(InputError, match=message):
        load_for_task(str(folder), "classification", num_labels=2)


def test_weights_that_are_integers_already(tmp_path):
    folder = write_model(tmp_path / "model", tiny_bert(BertForSequenceClassification))
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has a quantization_config, so its weights are integers, wanted floats"):
        load_for_task(str(folder), "classification", num_labels=2)
    with pytest.raises(InputError, match="has a quantization_config"):
        export(folder, tmp_path / "out", to="onnx")
