"""MPNet: RoBERTa's positions and heads, a bias by relative position, WordPiece tokens, and no token types."""

from dataclasses import replace

from pruneofa.families.family import Layer, RelativeBias, Shape
from pruneofa.families.roberta import ROBERTA

MPNET = replace(
    ROBERTA,
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
    token_types=False,
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
    tokenizer_files=("vocab.txt",),
    tokenizer_types=False,
    shapes=(Shape("mpnet-base", "MPNet-Base", layers=12, hidden=768, heads=12, inner=3072),),
)
