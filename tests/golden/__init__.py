"""Golden packed folders, one per format version and variant, and the recipe they were made by.

`source(folder)` writes the Hugging Face folder they are packed from: a BERT of one layer, hidden size 4, whose
weights are quarters computed from their position, with rows of zeros and -0.0 where a format can go wrong. The one of
`STATIC` is put on the int8 grid first, one scale per tensor, with codes of -128 and static activations; the one of
`DYNAMIC` with a scale per row and dynamic activations. That of `BIASED` is an MPNet of the same weights with a bias by
relative position. To add the folders of a new version:
`pack(source(tmp), GOLDEN / "v2-int8")` and so on; those of old versions stay.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.quantized import quantize_folder

GOLDEN = Path(__file__).parent
VARIANTS = {
    "v1-int8": {"precision": "int8"},
    "v1-fp32": {"precision": "fp32"},
    "v1-int8-zstd": {"precision": "int8", "compress": True},
    "v1-int8-static": {"precision": "int8"},
    "v1-int8-quantized": {"precision": "int8"},
    "v1-int8-mpnet": {"precision": "int8"},
}
STATIC, DYNAMIC, BIASED = "v1-int8-static", "v1-int8-quantized", "v1-int8-mpnet"
HIDDEN, WIDE, WORDS, POSITIONS = 4, 10, 7, 6  # 4 and 10 columns: neither fills whole bytes of bits
LAYER = "bert.encoder.layer.0."
CONFIG = {
    "architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_size": HIDDEN,
    "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": WIDE, "vocab_size": WORDS,
    "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
BIASED_CONFIG = {
    **{key: value for key, value in CONFIG.items() if key != "type_vocab_size"},
    "architectures": ["MPNetForSequenceClassification"], "model_type": "mpnet", "pad_token_id": 1,
    "relative_attention_num_buckets": 32,
}  # fmt: skip
MPNET_NAMES = {
    "bert.": "mpnet.", "attention.self.query": "attention.attn.q", "attention.self.key": "attention.attn.k",
    "attention.self.value": "attention.attn.v", "attention.output.dense": "attention.attn.o",
    "attention.output.LayerNorm": "attention.LayerNorm", "classifier": "classifier.out_proj",
    "mpnet.pooler.dense": "classifier.dense",
}  # fmt: skip


def weight(rows: int, columns: int, seed: int) -> np.ndarray:
    """float32 (rows, columns) of quarters in [-1.5, 1.5], a good half of them zero; row 1 all zero."""
    row, column = np.indices((rows, columns))
    number = (7 * row + 3 * column + seed) % 13 - 6
    values = np.where((row + 2 * column + seed) % 3 == 0, number, 0) / 4
    values[1] = 0
    return values.astype(np.float32)


def tensors(variant: str = "") -> dict[str, np.ndarray]:
    """The weights of a variant by the names that transformers gives them; before they are put on the int8 grid."""
    shapes = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (WIDE, HIDDEN),
        "output.dense": (HIDDEN, WIDE),
    }
    found: dict[str, np.ndarray] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        found[f"{LAYER}{name}.weight"] = weight(*shape, seed)
        found[f"{LAYER}{name}.bias"] = weight(2, shape[0], seed)[0]
    found[f"{LAYER}output.dense.weight"][1, 3] = -0.0
    for seed, (name, rows) in enumerate({"word": WORDS, "position": POSITIONS, "token_type": 2}.items()):
        found[f"bert.embeddings.{name}_embeddings.weight"] = weight(rows, HIDDEN, seed)
    for name in ("bert.embeddings.LayerNorm", f"{LAYER}attention.output.LayerNorm", f"{LAYER}output.LayerNorm"):
        found |= {f"{name}.weight": np.ones(HIDDEN, np.float32), f"{name}.bias": np.zeros(HIDDEN, np.float32)}
    found |= {"bert.pooler.dense.weight": weight(HIDDEN, HIDDEN, 9), "bert.pooler.dense.bias": np.zeros(4, np.float32)}
    found |= {"classifier.weight": weight(2, HIDDEN, 5), "classifier.bias": np.float32([0.25, -0.5])}
    return _as_mpnet(found) if variant == BIASED else found


def _as_mpnet(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, values in found.items():
        for old, new in MPNET_NAMES.items():
            name = name.replace(old, new)
        renamed[name] = values
    del renamed["mpnet.embeddings.token_type_embeddings.weight"]
    return renamed | {"mpnet.encoder.relative_attention_bias.weight": weight(32, 2, 3)}


def source(folder: Path, variant: str = "") -> Path:
    """Write the Hugging Face folder of a variant; returns it."""
    folder.mkdir(parents=True)
    save_file(tensors(variant), folder / "model.safetensors", {"format": "pt"})
    config = BIASED_CONFIG if variant == BIASED else CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {piece: i for i, piece in enumerate(pieces)}}  # fmt: skip
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    tokenizer = {"version": "1.0", "added_tokens": [], **dict.fromkeys(parts), "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    if variant == STATIC:
        quantize_folder(folder, strategy="tensor")
    if variant == DYNAMIC:
        quantize_folder(folder, static=False)
    return folder
