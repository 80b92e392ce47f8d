"""A Hugging Face folder of a known shape with random weights; speed depends on shape and pattern, not on values."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.formats.architecture import read_architecture
from pruneofa.formats.pattern import BLOCKS

_VOCABULARY, _TOKENS, _PAD = 30522, 512, 0
_SPREAD = 0.02  # `initializer_range` of most configs
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_random(folder: Path, shape: str, sparsity: float, pattern: str = "unstructured", *, seed: int = 0) -> None:
    """Make `folder`: gaussian weights of a shape of `families.shapes()`, pruned by magnitude; a tokenizer.

    Raises:
        InputError: an unknown shape or pattern, or a sparsity outside [0, 1).
    """
    check_random(shape, sparsity, pattern)
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(_tensors(shape, sparsity, pattern, seed)), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2), encoding="utf-8")
    words = [*_SPECIAL, *(f"w{index}" for index in range(_VOCABULARY - len(_SPECIAL)))]
    _tokenizer(words).save(str(folder / "tokenizer.json"))


def check_random(shape: str, sparsity: float, pattern: str) -> None:
    """Raise InputError for arguments that `write_random` does not support."""
    if shape not in families.shapes():
        raise InputError(f"--random {shape!r}: wanted one of {', '.join(families.shapes())}")
    if pattern not in BLOCKS:
        raise InputError(f"pattern {pattern!r}: wanted one of {', '.join(BLOCKS)}")
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}, wanted at least 0 and below 1 (a fraction, not percent)")


def prune(weight: NDArray[np.float32], sparsity: float, pattern: str) -> NDArray[np.float32]:
    """`weight` (rows, columns) with its int(sparsity * blocks) blocks of the smallest mean magnitude set to 0."""
    rows, columns = weight.shape
    height, width = BLOCKS[pattern]
    blocks = weight.reshape(rows // height, height, columns // width, width)
    score = np.abs(blocks).mean(axis=(1, 3)).reshape(-1)
    kept = np.ones(score.size, bool)
    count = int(sparsity * score.size)
    if count:
        kept[np.argpartition(score, count - 1)[:count]] = False
    mask = kept.reshape(rows // height, 1, columns // width, 1)
    return np.where(mask, blocks, np.float32(0)).reshape(rows, columns)


def _config(shape: str) -> dict[str, object]:
    family, sizes = families.shapes()[shape]
    keys = family.keys
    config: dict[str, object] = {
        "model_type": family.model_type,
        "architectures": [family.classes["embedding"]],
        keys.layers: sizes.layers,
        keys.hidden: sizes.hidden,
        keys.heads: sizes.heads,
        keys.inner: sizes.inner,
        keys.activation: "gelu",
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": _TOKENS + family.first_position(_PAD),
        "pad_token_id": _PAD,
    }
    if family.token_types:
        config["type_vocab_size"] = 2
    if family.epsilon is None:
        config["layer_norm_eps"] = 1e-12
    if bias := family.relative_bias:
        config[bias.key] = bias.buckets
    return config


def _tensors(shape: str, sparsity: float, pattern: str, seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    random = np.random.default_rng(seed)

    def gaussian(*size: int) -> NDArray[np.float32]:
        return random.standard_normal(size, np.float32) * np.float32(_SPREAD)

    architecture = read_architecture(_config(shape), shape)
    hidden = architecture.hidden
    for table, name in architecture.tables.items():
        yield name, gaussian(architecture.rows[table], hidden)
    if bias := architecture.family.relative_bias:
        yield f"{bias.table}.weight", gaussian(bias.buckets, architecture.heads)
    norms = [architecture.family.embedding_norm]
    for index in range(architecture.layers):
        for field, module in architecture.layer(index).items():
            if field.endswith("_norm"):
                norms.append(module)
                continue
            size = architecture.linear_shape(field)
            yield f"{module}.weight", prune(gaussian(*size), sparsity, pattern)
            yield f"{module}.bias", gaussian(size[0])
    for module in norms:
        yield f"{module}.weight", np.ones(hidden, np.float32)
        yield f"{module}.bias", np.zeros(hidden, np.float32)


def _tokenizer(words: Sequence[str]) -> Any:
    """A `tokenizers.Tokenizer` that gives the id of each of `words`, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer
