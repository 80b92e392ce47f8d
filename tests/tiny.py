"""Tiny models and a real tokenizer, made here: no network, no files.

The folders of `write_folder` come of NumPy alone, for the engine and the kernels; the models of `tiny_bert` and its
like are transformers' own, for all that trains or has to agree with them. torch is imported by those only.
"""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import BertWordPieceTokenizer

HIDDEN, INNER, LAYERS, HEADS, POSITIONS = 32, 64, 2, 4, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """
the of and to in a is was it for on with as by at from that this are be an or his her they which one two
first new not has had have were but all also after most such city river sea people world year time war
music film book game team good bad great terrible story what who where when how many capital king queen
water house ##s ##ed ##ing ##ly ##er ##est ##tion
"""
_CHARACTERS = string.ascii_lowercase + string.digits  # each alone and within a word
_PIECES = [*SPECIAL, *WORDS.split(), *_CHARACTERS, *(f"##{c}" for c in _CHARACTERS), *".,;:!?'\"()-%/"]
VOCABULARY = {piece: index for index, piece in enumerate(dict.fromkeys(_PIECES))}


def tiny_tokenizer() -> Any:
    """A BertTokenizerFast with about 180 pieces; no ordinary English word becomes [UNK]."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab=VOCABULARY, do_lower_case=True, model_max_length=POSITIONS)


# Models of transformers


def tiny_bert(model: type | None = None, *, seed: int = 0, **config: Any) -> Any:
    """A BERT (for pre-training, if nothing is said) of the sizes above; `config` overrides any field."""
    from transformers import BertConfig, BertForPreTraining

    return _build(model or BertForPreTraining, BertConfig, seed, {"type_vocab_size": 2, **_bert_sizes()} | config)


def tiny_distilbert(model: type | None = None, *, seed: int = 0, **config: Any) -> Any:
    """A DistilBERT of the same size, for masked LM if nothing is said."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    sizes = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER}
    return _build(model or DistilBertForMaskedLM, DistilBertConfig, seed, {**_common_sizes(), **sizes} | config)


def tiny_roberta(model: type | None = None, *, seed: int = 0, **config: Any) -> Any:
    """A RoBERTa of the same size; its padding token is 0 here so that `tiny_tokenizer` fits all three."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"type_vocab_size": 1, **_bert_sizes(), "max_position_embeddings": POSITIONS + 2}
    return _build(model or RobertaForMaskedLM, RobertaConfig, seed, sizes | config)


def tiny_mpnet(model: type | None = None, *, seed: int = 0, **config: Any) -> Any:
    """An MPNet of the same size. Its positions leave out token 1 whatever the config says: here that is [UNK]."""
    from transformers import MPNetConfig, MPNetForMaskedLM

    sizes = _bert_sizes() | {"max_position_embeddings": POSITIONS + 2, "pad_token_id": 1}
    return _build(model or MPNetForMaskedLM, MPNetConfig, seed, sizes | config)


def write_model(folder: Path, model: Any = None) -> Path:
    """Save a model (a `tiny_bert` if none is given) with its tokenizer; returns the folder."""
    (model or tiny_bert()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def half_pruned(model: Any, *, noise: float = 0.2, seed: int = 1) -> Any:
    """`model` with normal noise on every weight, so that outputs differ from text to text, and half its layers zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
            if ".layer." in name and weight.ndim == 2:
                weight *= torch.rand(weight.shape, generator=generator) < 0.5
    return model


def _common_sizes() -> dict[str, int]:
    return {"vocab_size": len(VOCABULARY), "max_position_embeddings": POSITIONS, "pad_token_id": 0}


def _bert_sizes() -> dict[str, int]:
    return _common_sizes() | {
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    }  # fmt: skip


def _build(model: type, config: type, seed: int, fields: dict[str, Any]) -> Any:
    """Initialise with `seed` without touching the caller's random state."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config(**fields)).eval()


# Folders without torch


def write_folder(folder: Path, head: str = "ForSequenceClassification", *, labels: int = 3, **config: Any) -> Path:
    """A BERT with this head and random weights; every second encoder weight is zero; `config` overrides fields."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": [f"Bert{head}"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "id2label": {str(index): f"label {index}" for index in range(labels)},
        **_bert_sizes(),
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


def modules_json(**paths: str) -> list[dict[str, str]]:
    """The modules.json of a sentence-transformers folder: path by kind, by default of mean pooling as it is saved."""
    paths = paths or {"Transformer": "", "Pooling": "1_Pooling"}
    return [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in paths.items()]
