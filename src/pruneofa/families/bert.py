"""BERT. MiniLM has the same architecture and names."""

from pruneofa.families.family import (
    POOLER,
    ClassificationHead,
    ConfigKeys,
    Family,
    Layer,
    MaskedLMHead,
    Shape,
)

BERT = Family(
    title="BERT",
    model_type="bert",
    prefix="bert",
    classes={
        "embedding": "BertModel",
        "classification": "BertForSequenceClassification",
        "question answering": "BertForQuestionAnswering",
        "token classification": "BertForTokenClassification",
        "masked-LM": "BertForMaskedLM",
    },
    pretraining="BertForPreTraining",
    keys=ConfigKeys(
        hidden="hidden_size",
        layers="num_hidden_layers",
        heads="num_attention_heads",
        inner="intermediate_size",
        activation="hidden_act",
    ),
    epsilon=None,
    token_types=True,
    positions_after_padding=False,
    tables={
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "token_type": "embeddings.token_type_embeddings",
    },
    embedding_norm="embeddings.LayerNorm",
    layers="encoder.layer",
    layer=Layer(
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        intermediate="intermediate.dense",
        output="output.dense",
        output_norm="output.LayerNorm",
    ),
    pooler=True,
    classification=ClassificationHead(dense=POOLER, activation="tanh", output="classifier"),
    question_answering="qa_outputs",
    token_classification="classifier",
    masked_lm=MaskedLMHead(
        dense="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
        biases=("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
    next_sentence="cls.seq_relationship",
    tokenizer_files=("vocab.txt",),
    shapes=(
        Shape("bert-base", "BERT-Base", layers=12, hidden=768, heads=12, inner=3072),
        Shape("bert-large", "BERT-Large", layers=24, hidden=1024, heads=16, inner=4096),
        Shape("minilm", "MiniLM-L6", layers=6, hidden=384, heads=12, inner=1536),
    ),
)
