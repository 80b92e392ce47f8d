"""A Hugging Face folder of a known shape with random weights: speed depends on shape and zeros, not on values."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pruneofa.errors import InputError
from pruneofa.formats.pattern import BLOCKS

_BERT = {"layers": 12, "hidden": 768, "heads": 12, "inner": 3072}
SHAPES: dict[str, dict[str, int]] = {
    "bert-base": _BERT,
    "bert-large": {"layers": 24, "hidden": 1024, "heads": 16, "inner": 4096},
    "minilm": {"layers": 6, "hidden": 384, "heads": 12, "inner": 1536},
    "distilbert": _BERT | {"layers": 6},
}
_VOCABULARY, _POSITIONS = 30522, 512
_SPREAD = 0.02  # what BERT is initialised with
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_random(folder: Path, shape: str, sparsity: float, pattern: str = "unstructured", *, seed: int = 0) -> None:
    """Make `folder`: gaussian weights of one of `SHAPES`, the encoder's pruned by magnitude; a tokenizer that fits.

    Raises:
        InputError: an unknown shape or pattern, or a sparsity outside [0, 1).
    """
    check_random(shape, sparsity, pattern)
    from safetensors.numpy import save_file
    from tokenizers import BertWordPieceTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    distil = shape == "distilbert"
    save_file(dict(_tensors(shape, sparsity, pattern, seed)), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(SHAPES[shape], distil), indent=2), encoding="utf-8")
    words = [*_SPECIAL, *(f"w{index}" for index in range(_VOCABULARY - len(_SPECIAL)))]
    tokenizer = BertWordPieceTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save(str(folder / "tokenizer.json"))


def check_random(shape: str, sparsity: float, pattern: str) -> None:
    """Raise InputError for what `write_random` cannot make."""
    if shape not in SHAPES:
        raise InputError(f"random shape {shape!r}: wanted one of {', '.join(SHAPES)}")
    if pattern not in BLOCKS:
        raise InputError(f"pattern {pattern!r}: wanted one of {', '.join(BLOCKS)}")
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}, wanted at least 0 and below 1 (a fraction, not percent)")


def prune(weight: NDArray[np.float32], sparsity: float, pattern: str) -> NDArray[np.float32]:
    """`weight` (rows, columns) with its int(sparsity * blocks) blocks of the smallest mean magnitude set to 0."""
    rows, columns = weight.shape
    high, wide = BLOCKS[pattern]
    blocks = weight.reshape(rows // high, high, columns // wide, wide)
    score = np.abs(blocks).mean(axis=(1, 3)).reshape(-1)
    kept = np.ones(score.size, bool)
    count = int(sparsity * score.size)
    if count:
        kept[np.argpartition(score, count - 1)[:count]] = False
    mask = kept.reshape(rows // high, 1, columns // wide, 1)
    return np.where(mask, blocks, np.float32(0)).reshape(rows, columns)


def _config(sizes: dict[str, int], distil: bool) -> dict[str, object]:
    common: dict[str, object] = {"vocab_size": _VOCABULARY, "max_position_embeddings": _POSITIONS, "pad_token_id": 0}
    if distil:
        names = {"layers": "n_layers", "hidden": "dim", "heads": "n_heads", "inner": "hidden_dim"}
        common |= {"model_type": "distilbert", "architectures": ["DistilBertModel"], "activation": "gelu"}
    else:
        names = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
                 "inner": "intermediate_size"}  # fmt: skip
        common |= {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "type_vocab_size": 2}
        common["layer_norm_eps"] = 1e-12
    return common | {names[name]: size for name, size in sizes.items()}


def _tensors(shape: str, sparsity: float, pattern: str, seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from pruneofa.engine.architectures import BERT_LAYER, DISTILBERT_LAYER

    random = np.random.default_rng(seed)

    def gaussian(*size: int) -> NDArray[np.float32]:
        return random.standard_normal(size, np.float32) * np.float32(_SPREAD)

    sizes, distil = SHAPES[shape], shape == "distilbert"
    hidden, inner = sizes["hidden"], sizes["inner"]
    tables = {"word": _VOCABULARY, "position": _POSITIONS} | ({} if distil else {"token_type": 2})
    for name, rows in tables.items():
        yield f"embeddings.{name}_embeddings.weight", gaussian(rows, hidden)
    norms = ["embeddings.LayerNorm"]
    prefix, names = ("transformer", DISTILBERT_LAYER) if distil else ("encoder", BERT_LAYER)
    wide = {"intermediate": (inner, hidden), "output": (hidden, inner)}
    for index in range(sizes["layers"]):
        for ours, theirs in names.items():
            name = f"{prefix}.layer.{index}.{theirs}"
            if ours.endswith("_norm"):
                norms.append(name)
                continue
            rows, columns = wide.get(ours, (hidden, hidden))
            yield f"{name}.weight", prune(gaussian(rows, columns), sparsity, pattern)
            yield f"{name}.bias", gaussian(rows)
    for name in norms:
        yield f"{name}.weight", np.ones(hidden, np.float32)
        yield f"{name}.bias", np.zeros(hidden, np.float32)
