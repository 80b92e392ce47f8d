"""Tiny models of every supported architecture and a real tokenizer, made here: no network, no files."""

import string
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """
the of and to in a is was it for on with as by at from that this are be an or his her they which one two
first new not has had have were but all also after most such city river sea people world year time war
music film book game team good bad great terrible story what who where when how many capital king queen
water house ##s ##ed ##ing ##ly ##er ##est ##tion
"""


def tiny_vocabulary() -> dict[str, int]:
    """Special tokens, frequent words, and every letter, digit and mark alone and as a continuation."""
    characters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL, *WORDS.split(), *characters, *(f"##{c}" for c in characters), *".,;:!?'\"()-%/"]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def tiny_tokenizer() -> BertTokenizerFast:
    """A real WordPiece tokenizer with about 180 pieces; no ordinary English word becomes [UNK]."""
    return BertTokenizerFast(vocab=tiny_vocabulary(), do_lower_case=True, model_max_length=64)


def tiny_bert(model: type[PreTrainedModel] = BertForPreTraining, *, seed: int = 0, **config: Any) -> Any:
    """A BERT of 2 layers, hidden 32, FFN 64, 4 heads; `config` overrides any field."""
    return _build(model, BertConfig, seed, dict(type_vocab_size=2, **_sizes("bert")) | config)


def tiny_distilbert(model: type[PreTrainedModel] = DistilBertForMaskedLM, *, seed: int = 0, **config: Any) -> Any:
    """A DistilBERT of the same size."""
    return _build(model, DistilBertConfig, seed, _sizes("distilbert") | config)


def tiny_roberta(model: type[PreTrainedModel] = RobertaForMaskedLM, *, seed: int = 0, **config: Any) -> Any:
    """A RoBERTa of the same size; its padding token is 0 here so that `tiny_tokenizer` fits all three."""
    sizes = dict(type_vocab_size=1, **_sizes("bert")) | {"max_position_embeddings": 66}
    return _build(model, RobertaConfig, seed, sizes | config)


def _sizes(family: str) -> dict[str, int]:
    common = {"vocab_size": len(tiny_vocabulary()), "max_position_embeddings": 64, "pad_token_id": 0}
    if family == "distilbert":
        return common | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    return common | {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip


def _build(model: type[PreTrainedModel], config: type, seed: int, fields: dict[str, Any]) -> PreTrainedModel:
    """Initialise with `seed` without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config(**fields)).eval()
