"""Hashes of the outputs of the engine and its kernels, for every instruction set of this machine and seeded inputs.

    python benchmarks/output_hashes.py > before.json
    python benchmarks/output_hashes.py --check before.json

A change that only moves or renames leaves every hash as it is. For another checkout run this with the interpreter of
its own .venv. Hashes of one path may differ between processors where their compilers or libraries do, so before and
after belong on one machine. With --check, exit code 1 if a path that both have gives another hash; paths that only one
of them has are named.
"""

import argparse
import hashlib
import json
import string
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import BertWordPieceTokenizer

from pruneofa import Engine, _native

# hidden, heads, inner, layers, sparsity, pattern (rows x columns of a block): heads of 32 and others, sizes that no
# tile divides, and MiniLM's shape.
MODELS = {
    "64-dense": (64, 2, 256, 2, 0.0, (1, 1)),
    "64-90": (64, 2, 256, 2, 0.9, (1, 1)),
    "128-80-4x1": (128, 4, 512, 2, 0.8, (4, 1)),
    "72-50-1x4": (72, 9, 100, 2, 0.5, (1, 4)),
    "96-70": (96, 1, 130, 3, 0.7, (1, 1)),
    "384-90": (384, 12, 1536, 6, 0.9, (1, 1)),
}
BATCHES = ((1, 1), (1, 8), (3, 17), (8, 33), (2, 128))  # sequences, tokens of the longest
LAYERS = ((1, 1), (17, 33), (33, 200), (64, 768), (129, 65))  # outputs, inputs
SPARSITY = (0.0, 0.5, 0.9, 1.0)
TOKENS = (1, 17, 80)
WORDS, POSITIONS = 500, 128


def uniform(random: np.random.Generator, *shape: int, size: float = 1.0) -> np.ndarray:
    """Floats between -size and size that are the same everywhere: multiples of size / 2^15."""
    return (random.integers(-(2**15), 2**15, shape) / 2**15 * size).astype(np.float32)


def kept(random: np.random.Generator, n: int, k: int, sparsity: float, block: tuple[int, int] = (1, 1)) -> np.ndarray:
    """(n, k) bool, in blocks of rows x columns; the last output is all zeros unless the layer is dense."""
    mask = random.random((-(-n // block[0]), -(-k // block[1]))) >= sparsity
    mask = mask.repeat(block[0], axis=0).repeat(block[1], axis=1)[:n, :k]
    if sparsity > 0:
        mask[-1] = False
    return mask


def write_folder(folder: Path, name: str) -> None:
    """A BERT of this shape, without a head."""
    hidden, heads, inner, layers, sparsity, block = MODELS[name]
    random = np.random.default_rng(sorted(MODELS).index(name))
    tensors = {
        f"embeddings.{table}_embeddings.weight": uniform(random, rows, hidden)
        for table, rows in (("word", WORDS), ("position", POSITIONS), ("token_type", 2))
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(layers):
        layer = f"encoder.layer.{index}."
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
        shapes = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")} | {
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (inner, hidden),
            "output.dense": (hidden, inner),
        }
        for part, (n, k) in shapes.items():
            weight = uniform(random, n, k, size=3 / np.sqrt(k * max(1 - sparsity, 0.05)))
            tensors[f"{layer}{part}.weight"] = np.where(kept(random, n, k, sparsity, block), weight, np.float32(0))
            tensors[f"{layer}{part}.bias"] = uniform(random, n, size=0.1)
    for norm in norms:
        tensors |= {f"{norm}.weight": 1 + uniform(random, hidden, size=0.5), f"{norm}.bias": uniform(random, hidden)}
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "vocab_size": WORDS,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    pieces += [f"##{a}{b}" for a in string.ascii_lowercase for b in string.ascii_lowercase][: WORDS - len(pieces)]
    BertWordPieceTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": POSITIONS}))


def sha256(array: np.ndarray) -> str:
    """Hash of dtype, shape and bytes."""
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()


def engine_hashes(isa: str, folders: Path) -> dict[str, str]:
    """`Engine.encode` of every model, precision, batch and number of threads."""
    found = {}
    for name in MODELS:
        for precision in ("fp32", "int8"):
            for threads in (1, 2):
                engine = Engine.from_pretrained(folders / name, precision=precision, threads=threads, isa=isa)
                for count, longest in BATCHES:
                    random = np.random.default_rng(count * 1000 + longest)
                    lengths = np.maximum(random.integers(longest // 2, longest + 1, count), 1)
                    lengths[0] = longest
                    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
                    ids = random.integers(0, WORDS, (count, longest))
                    types = random.integers(0, 2, (count, longest))
                    hidden = engine.encode(ids, mask, types)
                    found[f"encode {name} {precision} {count}x{longest} threads={threads}"] = sha256(hidden)
    return found


def linear_hashes(isa: str) -> dict[str, str]:
    """Sums and outputs of single layers: int8 by the token, int8 with a static input, float."""
    found = {}
    for n, k in LAYERS:
        for sparsity in SPARSITY:
            random = np.random.default_rng(n * 1000 + k)
            mask = kept(random, n, k, sparsity)
            bits = np.packbits(mask, axis=1, bitorder="little")
            codes = random.integers(-128, 128, (n, k)).astype(np.int8)[mask]
            scale, bias = np.abs(uniform(random, n, size=0.01)) + np.float32(0.001), uniform(random, n)
            layers = {
                "int8": _native.Linear(bits, codes, scale, bias, k, isa),
                "static": _native.Linear(bits, codes, scale, bias, k, isa, (0.02, 100)),
                "fp32": _native.Linear(bits, uniform(random, n, k)[mask], None, bias, k, isa),
            }
            for tokens in TOKENS:
                x, words = uniform(random, tokens, k, size=3), random.integers(0, 256, (tokens, k), dtype=np.uint8)
                case = f"{n}x{k} sparsity={sparsity} tokens={tokens}"
                found |= {f"forward {kind} {case}": sha256(layer.forward(x)) for kind, layer in layers.items()}
                found[f"accumulate {case}"] = sha256(layers["int8"].accumulate(words))
    return found


def differing(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """The cases of paths that both have, in which the hashes differ or one is missing."""
    return [
        f"{isa}: {case}"
        for isa in before.keys() & after.keys()
        for case in sorted(before[isa].keys() | after[isa].keys())
        if before[isa].get(case) != after[isa].get(case)
    ]


def main() -> None:
    """Print the hashes, or compare them with recorded ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with this output of an earlier run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            write_folder(Path(folder) / name, name)
        hashes = {isa: engine_hashes(isa, Path(folder)) | linear_hashes(isa) for isa in Engine.available_isas()}
    if options.check is None:
        print(json.dumps(hashes, indent=1))
        return
    before = json.loads(options.check.read_text())
    wrong = differing(before, hashes)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    both = [isa for isa in hashes if isa in before]
    unmatched = sorted(before.keys() ^ hashes.keys())
    print(f"{sum(len(hashes[isa]) for isa in both)} hashes of {', '.join(both)}: {len(wrong)} differ")
    print(f"not compared, because only one has them: {', '.join(unmatched) or 'none'}")
    sys.exit(bool(wrong) or not both)


if __name__ == "__main__":
    main()
