"""Print the Spearman correlation of a sentence-transformers folder on STS-B, by the engine and by transformers.

    python results/stsb.py all-mpnet-base-v2 DATA/stsb/validation.parquet > results/all-mpnet-base-v2/stsb.json

The file has the columns sentence1, sentence2 and score. The correlation, in percent, is that of the score with the
cosine of the two embeddings. The folder's pooling has to be the mean over all tokens.
"""

import argparse
import json
import sys
from collections.abc import Callable
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


def by_transformers(folder: Path, texts: list[str]) -> Embeddings:
    """The mean of the last hidden states of each text (texts, hidden), padded to the longest of its batch."""
    sentence = read_sentence(folder)
    if sentence is None or sentence.pooling != "mean":
        raise SystemExit(f"{folder}: wanted a sentence-transformers folder with mean pooling")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, trust_remote_code=False).eval()
    found = []
    with torch.no_grad():
        for begin in range(0, len(texts), BATCH):
            inputs = tokenizer(
                texts[begin : begin + BATCH], padding=True, truncation=True, max_length=sentence.max_seq_length,
                return_tensors="pt",
            )  # fmt: skip
            mask = inputs["attention_mask"][..., None]
            found.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found).numpy()


def correlation(embeddings: Embeddings, scores: NDArray[Any]) -> float:
    """Spearman's, in percent, of the scores (pairs,) with the cosines of embeddings (2 · pairs, hidden)."""
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    first, second = np.split(embeddings, 2)
    return 100 * float(spearmanr((first * second).sum(1), scores).statistic)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    table = pq.read_table(arguments.data)
    texts = [*table["sentence1"].to_pylist(), *table["sentence2"].to_pylist()]
    scores = table["score"].to_numpy()

    def engine(precision: Any) -> Embeddings:
        model = Engine.from_pretrained(arguments.folder, precision=precision, threads=arguments.threads)
        isas.add(model.isa)
        return model.predict(texts, batch_size=BATCH, truncate=True)

    isas: set[str] = set()
    runs: dict[str, Callable[[], Embeddings]] = {
        "transformers": lambda: by_transformers(arguments.folder, texts),
        "engine_fp32": lambda: engine("fp32"),
        "engine_int8": lambda: engine("int8"),
    }
    spearman = {name: round(correlation(embed(), scores), 3) for name, embed in runs.items()}
    report = {
        "model": arguments.folder.name,
        "data": "STS-B " + arguments.data.stem,
        "pairs": len(scores),
        "spearman": spearman,
        "isa": sorted(isas),
        "cpu": processor(),
        "versions": {
            "pruneofa": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
