"""Folders to export."""

import torch
import transformers

from tests.quantized import quantize_folder
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta, write_model

FAMILIES = {"Bert": tiny_bert, "DistilBert": tiny_distilbert, "Roberta": tiny_roberta, "MPNet": tiny_mpnet}
HEADS = ["ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification", "ForMaskedLM", "Model"]
CLASSIFIER = "ForSequenceClassification"
QUERY = "encoder.layer.0.attention.self.query.weight"


def save(folder, family="Bert", head=CLASSIFIER, *, static=True, strategy="channel", int8=True, **config):
    """A sparse model of one layer whose outputs differ from text to text, on the int8 grid."""
    layers = "n_layers" if family == "DistilBert" else "num_hidden_layers"
    model = FAMILIES[family](getattr(transformers, family + head), initializer_range=0.2, **{layers: 1} | config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer." in name and weight.ndim == 2:
                weight *= torch.rand(weight.shape, generator=generator) < 0.2
            elif weight.ndim == 1:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    write_model(folder, model)
    if int8:
        quantize_folder(folder, static=static, strategy=strategy)
    return folder
