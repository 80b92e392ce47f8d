"""MPNet: BERT's encoder with a bias by relative position beside positions after padding, and without token types."""

from dataclasses import replace

from pruneofa.families.bert import BERT
from pruneofa.families.family import ClassificationHead, Layer, MaskedLMHead, RelativeBias, Shape

MPNET = replace(
    BERT,
    title="MPNet",
    model_type="mpnet",
    prefix="mpnet",
    classes={
        "embedding": "MPNetModel",
        "classification": "MPNetForSequenceClassification",
        "question answering": "MPNetForQuestionAnswering",
        "token classification": "MPNetForTokenClassification",
        "masked-LM": "MPNetForMaskedLM",
    },
    pretraining=None,
    token_types=False,
    positions_after_padding=True,
    pad_id=1,  # fixed in transformers' code; config.json does not change it
    relative_bias=RelativeBias(
        table="encoder.relative_attention_bias", key="relative_attention_num_buckets", buckets=32, max_distance=128
    ),
    tables={"word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings"},
    layer=Layer(
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        attention_norm="attention.LayerNorm",
        intermediate="intermediate.dense",
        output="output.dense",
        output_norm="output.LayerNorm",
    ),
    classification=ClassificationHead(dense="classifier.dense", activation="tanh", output="classifier.out_proj"),
    masked_lm=MaskedLMHead(
        dense="lm_head.dense",
        norm="lm_head.layer_norm",
        decoder="lm_head.decoder",
        biases=("lm_head.bias", "lm_head.decoder.bias"),
        activation="gelu",  # fixed in transformers' code too
    ),
    next_sentence=None,
    shapes=(Shape("mpnet-base", "MPNet-Base", layers=12, hidden=768, heads=12, inner=3072),),
)
