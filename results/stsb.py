"""Print the Spearman correlation of a sentence-transformers folder on STS-B, by transformers or by the engine.

    python results/stsb.py all-mpnet-base-v2 stsb/validation.parquet --by engine-int8 > stsb-engine-int8.json

The file has the columns sentence1, sentence2 and score. The correlation, in percent, is that of the score with the
cosine of the two embeddings. The folder's pooling has to be the mean over all tokens.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from numpy.typing import NDArray
from scipy.stats import spearmanr

from pruneofa import Engine, __version__
from pruneofa.engine.hardware import processor
from pruneofa.formats.sentence import read_sentence

BATCH = 32
Embeddings = NDArray[np.float32]


def by_transformers(folder: Path, texts: list[str]) -> tuple[Embeddings, str]:
    """The mean of the last hidden states of each text (texts, hidden), and the library's version."""
    sentence = read_sentence(folder)
    if sentence is None or sentence.pooling != "mean":
        raise SystemExit(f"{folder}: wanted a sentence-transformers folder with mean pooling")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, trust_remote_code=False).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    with torch.no_grad():
        for begin in range(0, len(texts), BATCH):
            rows = order[begin : begin + BATCH]
            inputs = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=sentence.max_seq_length,
                return_tensors="pt",
            )  # fmt: skip
            mask = inputs["attention_mask"][..., None]
            found[rows] = ((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)).numpy()
    return found, f"transformers {transformers.__version__}, torch {torch.__version__}"


def by_engine(folder: Path, texts: list[str], precision: Any) -> tuple[Embeddings, str]:
    """What the engine predicts (texts, hidden), and its version and kernels."""
    engine = Engine.from_pretrained(folder, precision=precision)
    return engine.predict(texts, batch_size=BATCH, truncate=True), f"pruneofa {__version__}, {precision}, {engine.isa}"


def correlation(embeddings: Embeddings, scores: NDArray[Any]) -> float:
    """Spearman's, in percent, of the scores (pairs,) with the cosines of embeddings (2 · pairs, hidden)."""
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    first, second = np.split(embeddings, 2)
    return 100 * float(spearmanr((first * second).sum(1), scores).statistic)


def main() -> None:
    """Measure and print."""
    runs = {
        "transformers": by_transformers,
        "engine-fp32": lambda folder, texts: by_engine(folder, texts, "fp32"),
        "engine-int8": lambda folder, texts: by_engine(folder, texts, "int8"),
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--by", choices=runs, required=True)
    arguments = parser.parse_args()
    table = pq.read_table(arguments.data)
    texts = [*table["sentence1"].to_pylist(), *table["sentence2"].to_pylist()]
    scores = table["score"].to_numpy()
    embeddings, by = runs[arguments.by](arguments.folder, texts)
    report = {
        "model": arguments.folder.name,
        "data": f"STS-B {arguments.data.stem}",
        "pairs": len(scores),
        "by": by,
        "cpu": processor(),
        "spearman": round(correlation(embeddings, scores), 3),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
