"""Tiny BERT folders made without torch: random sparse weights, and a real WordPiece tokenizer."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import BertWordPieceTokenizer

HIDDEN, INNER, LAYERS, POSITIONS = 32, 64, 2, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "river", "city", "king", "film", "good", "bad", "great", "who", "what", "where", "is", "was"]
PIECES = [*SPECIAL, *WORDS, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *".,?!'"]
VOCABULARY = {piece: index for index, piece in enumerate(dict.fromkeys(PIECES))}


def write_folder(folder: Path, head: str = "ForSequenceClassification", *, labels: int = 3, **config: Any) -> Path:
    """A BERT with this head, 2 layers, hidden 32; every second encoder weight is zero; `config` overrides fields."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": [f"Bert{head}"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "vocab_size": len(VOCABULARY),
        "id2label": {str(index): f"label {index}" for index in range(labels)},
    } | config
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(_tensors(head, labels), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Files of the tokenizer; it cuts and pads, as some published ones do, and the engine must not."""
    tokenizer = BertWordPieceTokenizer(vocab=VOCABULARY)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]", "model_max_length": POSITIONS}))


def _tensors(head: str, labels: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "bert.embeddings.word_embeddings.weight": (len(VOCABULARY), HIDDEN),
        "bert.embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "bert.embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "bert.embeddings.LayerNorm": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = f"bert.encoder.layer.{index}."
        linears = [f"attention.self.{name}" for name in ("query", "key", "value")] + ["attention.output.dense"]
        shapes |= {f"{layer}{name}": (HIDDEN, HIDDEN) for name in linears}
        shapes |= {f"{layer}intermediate.dense": (INNER, HIDDEN), f"{layer}output.dense": (HIDDEN, INNER)}
        shapes |= {f"{layer}attention.output.LayerNorm": (HIDDEN,), f"{layer}output.LayerNorm": (HIDDEN,)}
    heads: dict[str, dict[str, tuple[int, ...]]] = {
        "Model": {},
        "ForSequenceClassification": {"bert.pooler.dense": (HIDDEN, HIDDEN), "classifier": (labels, HIDDEN)},
        "ForQuestionAnswering": {"qa_outputs": (2, HIDDEN)},
        "ForTokenClassification": {"classifier": (labels, HIDDEN)},
        "ForMaskedLM": {
            "cls.predictions.transform.dense": (HIDDEN, HIDDEN),
            "cls.predictions.transform.LayerNorm": (HIDDEN,),
            "cls.predictions.bias": (len(VOCABULARY),),
        },
    }
    tensors = {}
    for name, shape in (shapes | heads[head]).items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        if ".layer." in name and len(shape) == 2:
            values *= random.random(shape) < 0.5
        if name.endswith("LayerNorm"):
            tensors[f"{name}.weight"] = 1 + values
        elif name.endswith(".weight") or name.endswith(".bias"):
            tensors[name] = values
            continue
        else:
            tensors[f"{name}.weight"] = values
        tensors[f"{name}.bias"] = random.normal(0, 0.1, shape[0]).astype(np.float32)
    return tensors
