"""DistilBERT: no token types, no pooler; LayerNorm's epsilon is fixed in transformers' code."""

from pruneofa.families.family import ClassificationHead, ConfigKeys, Family, Layer, MaskedLMHead, Shape

DISTILBERT = Family(
    title="DistilBERT",
    model_type="distilbert",
    prefix="distilbert",
    classes={
        "embedding": "DistilBertModel",
        "classification": "DistilBertForSequenceClassification",
        "question answering": "DistilBertForQuestionAnswering",
        "token classification": "DistilBertForTokenClassification",
        "masked-LM": "DistilBertForMaskedLM",
    },
    pretraining=None,
    keys=ConfigKeys(hidden="dim", layers="n_layers", heads="n_heads", inner="hidden_dim", activation="activation"),
    epsilon=1e-12,
    token_types=False,
    positions_after_padding=False,
    tables={"word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings"},
    embedding_norm="embeddings.LayerNorm",
    layers="transformer.layer",
    layer=Layer(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        intermediate="ffn.lin1",
        output="ffn.lin2",
        output_norm="output_layer_norm",
    ),
    pooler=False,
    classification=ClassificationHead(dense="pre_classifier", activation="relu", output="classifier"),
    question_answering="qa_outputs",
    token_classification="classifier",
    masked_lm=MaskedLMHead(
        dense="vocab_transform",
        norm="vocab_layer_norm",
        decoder="vocab_projector",
        biases=("vocab_projector.bias",),
    ),
    next_sentence=None,
    tokenizer_files=("vocab.txt",),
    shapes=(Shape("distilbert", "DistilBERT", layers=6, hidden=768, heads=12, inner=3072),),
)
