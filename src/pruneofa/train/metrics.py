"""Metrics of predictions in percent, the terms of their rows, and the difference of two models with its standard error.

Both models of a comparison answer the same rows, so their difference is far better known than either metric: most rows
are answered alike. The terms of the rows keep what is needed for that.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pruneofa import recipe
from pruneofa.errors import InputError
from pruneofa.formats.files import new_file

Rows = NDArray[np.float32]
_DAMAGED = (zipfile.BadZipFile, zlib.error)  # beside which a flipped bit gives errors of many other types


@dataclass(frozen=True)
class Measured:
    """Metrics in percent, and for each one term per row: (rows,) float32 whose mean is the metric.

    A metric that is no mean over rows has the terms of its linearization: a ratio of sums A / B has
    A / B + (a - A / B * b) / mean(b), by which the variance of the metric is that of a mean (the delta method).
    """

    values: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)

    def __or__(self, other: "Measured") -> "Measured":
        return Measured(self.values | other.values, self.rows | other.rows)


def classification_metrics(
    task: str, labels: Sequence[str], targets: NDArray[np.int64], predicted: NDArray[np.int64], suffix: str = ""
) -> Measured:
    """Accuracy; for QQP also F1 of duplicates, and for other tasks than GLUE's the macro average of F1.

    Args:
        labels: the names of the classes.
        targets: the class of each row; `predicted` likewise.
        suffix: appended to the names of the metrics.
    """
    rows = {f"accuracy{suffix}": 100.0 * (targets == predicted)}
    if task not in recipe.KNOWN_TASKS:
        rows[f"f1{suffix}"] = _f1(targets, predicted, np.union1d(targets, predicted))
    elif task == "qqp":
        rows["f1"] = _f1(targets, predicted, np.array([labels.index("duplicate")]))
    return _means(rows)


def _f1(targets: NDArray[np.int64], predicted: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The terms of F1, averaged over the classes; a class that is never predicted right has 0."""
    terms = np.zeros(len(targets))
    for each in classes:
        both = 2.0 * ((targets == each) & (predicted == each))
        either = 1.0 * (targets == each) + (predicted == each)
        if total := either.sum():
            ratio = both.sum() / total
            terms += ratio + (both - ratio * either) * len(targets) / total
    return 100 * terms / len(classes)


def squad_metrics(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> Measured:
    """Exact match and F1 by the official normalisation, the best over the gold answers of each row."""
    from torchmetrics.functional.text import squad

    names = ("exact_match", "f1")
    rows = {name: np.zeros(len(predictions)) for name in names}
    for row, (text, texts) in enumerate(zip(predictions, golds, strict=True)):
        # One call per row: of many rows it gives the mean alone. Annotators often agree, and each answer costs time.
        distinct = list(dict.fromkeys(texts))
        answers = {"text": distinct, "answer_start": [0] * len(distinct)}
        scores = squad([{"prediction_text": text, "id": "0"}], [{"answers": answers, "id": "0"}])
        for name in names:
            rows[name][row] = float(scores[name])
    return _means(rows)


def _means(rows: dict[str, NDArray[np.float64]]) -> Measured:
    values = {name: float(terms.mean()) for name, terms in rows.items()}
    return Measured(values, {name: terms.astype(np.float32) for name, terms in rows.items()})


def save_rows(file: Path, measured: Measured) -> None:
    """Write the terms of the rows as .npz, one array per metric; the file is whole, or the one before it stays."""
    with new_file(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **cast(dict[str, Any], measured.rows))


def load_rows(file: Path) -> dict[str, Rows]:
    """The arrays that `save_rows` wrote; none if the file does not exist. Raises InputError for a damaged file."""
    if not file.exists():
        return {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            rows = dict(stored)
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, *_DAMAGED):
        rows = None
    if rows is None or not all(map(_are_terms, rows.values())):
        raise InputError(
            f"{file}: damaged, wanted the terms of the metrics of every row; copy it again, or delete it: only the "
            "standard errors of comparisons are lost"
        )
    return rows


def _are_terms(terms: Rows) -> bool:
    return terms.ndim == 1 and terms.dtype == np.float32 and bool(np.isfinite(terms).all())


def lost(dense: Mapping[int, Rows], other: Mapping[int, Rows]) -> dict[str, float] | None:
    """Points that another model loses against the dense one, and the standard error of that difference.

    Rows and seeds are both samples. The variance is that of the difference between rows, averaged over the seeds, plus,
    with several seeds, that of the mean difference between seeds, each divided by their number; what varies with row
    and seed together is in both, and is subtracted once (the variance of a mean over two crossed random factors).

    Args:
        dense: the terms of the rows, by seed; where it lacks a seed of `other`, its first one is compared.
        other: the same of the other model.

    Returns:
        {"mean", "standard_error"} in points of percent; None where rows of the same number are missing.
    """
    if not dense or not other:
        return None
    first = next(iter(dense.values()))
    pairs = [(dense.get(seed, first), rows) for seed, rows in other.items()]
    if any(len(one) != len(two) or len(one) != len(pairs[0][0]) for one, two in pairs) or len(first) < 2:
        return None
    differences = np.stack([one.astype(np.float64) - two for one, two in pairs])  # (seeds, rows)
    variance = differences.mean(axis=0).var(ddof=1) / differences.shape[1]
    if len(pairs) > 1:
        rest = differences - differences.mean(axis=0) - differences.mean(axis=1, keepdims=True) + differences.mean()
        both = (rest**2).sum() / ((len(pairs) - 1) * (differences.shape[1] - 1)) / differences.size
        variance += max(0.0, differences.mean(axis=1).var(ddof=1) / len(pairs) - both)
    return {"mean": float(differences.mean()), "standard_error": float(np.sqrt(variance))}
