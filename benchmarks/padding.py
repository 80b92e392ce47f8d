"""Tokens that are computed for each real token, with padding, in training and in evaluation.

    python benchmarks/padding.py DATA MODEL [--batch 32 128] [--corpus FILE ...] [--rows N]

DATA holds sst2/ mnli/ qnli/ qqp/ squad/ with the columns of the Hugging Face data sets; MODEL is a folder whose
tokenizer is used. Batches of random examples are shown for comparison. With --corpus, that of pre-training on these
files too.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pruneofa import recipe
from pruneofa.data.corpus import build_corpus
from pruneofa.data.features import evaluation_batches
from pruneofa.data.tasks import load_task
from pruneofa.recipe import Corpus
from pruneofa.train.device import ROWS
from pruneofa.train.models import load_tokenizer

EXAMPLES = 4096  # of pre-training


def ratio(batches: Iterable[np.ndarray]) -> float:
    """Computed tokens per real token of batches of lengths."""
    found = list(batches)
    return sum(len(lengths) * int(lengths.max()) for lengths in found) / sum(int(lengths.sum()) for lengths in found)


def random_batches(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """The lengths in batches of random order."""
    drawn = np.random.default_rng(0).permutation(lengths)
    return np.split(drawn, range(size, len(drawn), size))


def line(name: str, tokens: float, columns: list[float]) -> str:
    """One row of the table."""
    return f"{name:<12}{tokens:>14.1f}" + "".join(f"{column:>12.3f}" for column in columns)


def main() -> None:
    """Print a table with one row per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--corpus", nargs="+", default=[])
    parser.add_argument("--rows", type=int, help="first training rows of each task only")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    heads = [f"{kind} {size}" for size in options.batch for kind in ("random", "train")]
    print(f"{'task':<12}{'tokens/example':>14}" + "".join(f"{head:>12}" for head in [*heads, "evaluate"]))
    for name in recipe.KNOWN_TASKS:
        spec = recipe.Task(data=str(options.data / name), skip_bad_answers=True, train_rows=options.rows)
        task = load_task(name, spec, tokenizer)
        assert task.train is not None
        lengths, columns = task.train.lengths, []
        for size in options.batch:
            order = task.train.train_dataset(size, seed=0, epochs=1).order(0)
            columns += [ratio(random_batches(lengths, size)), ratio(lengths[order].reshape(-1, size))]
        rows = [data.lengths for data in task.evaluations.values()]
        columns.append(ratio(each[batch] for each in rows for batch in evaluation_batches(each, ROWS)))
        print(line(name, lengths.mean(), columns), flush=True)
    if options.corpus:
        corpus = build_corpus(Corpus(source=options.corpus), tokenizer).train(EXAMPLES, seed=0)
        lengths = np.array([len(corpus[index]["input_ids"]) for index in range(EXAMPLES)])
        columns = [ratio(np.split(lengths, range(n, EXAMPLES, n))) for n in options.batch for _ in range(2)]
        print(line("text", lengths.mean(), columns))


if __name__ == "__main__":
    main()
