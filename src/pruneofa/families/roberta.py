"""RoBERTa: BERT's encoder with positions after padding, byte-level tokens and different heads."""

from dataclasses import replace

from pruneofa.families.bert import BERT
from pruneofa.families.family import ClassificationHead, MaskedLMHead

ROBERTA = replace(
    BERT,
    title="RoBERTa",
    model_type="roberta",
    prefix="roberta",
    classes={
        "embedding": "RobertaModel",
        "classification": "RobertaForSequenceClassification",
        "question answering": "RobertaForQuestionAnswering",
        "token classification": "RobertaForTokenClassification",
        "masked-LM": "RobertaForMaskedLM",
    },
    pretraining=None,
    positions_after_padding=True,
    classification=ClassificationHead(dense="classifier.dense", activation="tanh", output="classifier.out_proj"),
    masked_lm=MaskedLMHead(
        dense="lm_head.dense",
        norm="lm_head.layer_norm",
        decoder="lm_head.decoder",
        biases=("lm_head.bias", "lm_head.decoder.bias"),
        activation="gelu",  # fixed in transformers' code; config.json does not change it
    ),
    next_sentence=None,
    tokenizer_files=("vocab.json", "merges.txt"),
    tokenizer_types=False,
    shapes=(),
)
