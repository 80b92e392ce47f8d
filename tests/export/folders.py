"""Folders to export."""

import torch
import transformers

from tests.quantized import quantize_folder
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta, write_model

FAMILIES = {"Bert": tiny_bert, "DistilBert": tiny_distilbert, "Roberta": tiny_roberta, "MPNet": tiny_mpnet}
HEADS = ["ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification", "ForMaskedLM", "Model"]
CLASSIFIER = "ForSequenceClassification"
QUERY, KEY, VALUE = (f"encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value"))


def save(folder, family="Bert", head=CLASSIFIER, *, static=True, strategy="channel", int8=True, equal=(), **config):
    """A sparse model of one layer whose outputs differ from text to text, on the int8 grid.

    The weights named by `equal` are the first of them.
    """
    layers = "n_layers" if family == "DistilBert" else "num_hidden_layers"
    model = FAMILIES[family](getattr(transformers, family + head), initializer_range=0.2, **{layers: 1} | config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer." in name and weight.ndim == 2:
                weight *= torch.rand(weight.shape, generator=generator) < 0.2
            elif weight.ndim == 1:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        for name in equal[1:]:
            model.base_model.get_parameter(name).copy_(model.base_model.get_parameter(equal[0]))
    write_model(folder, model)
    if int8:
        quantize_folder(folder, static=static, strategy=strategy)
    return folder
