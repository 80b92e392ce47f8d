"""What comes after the encoder, one class per task.

Every class has the same three methods. `prepare` tokenizes a batch of texts, into one sequence each or several.
`reduce` takes the hidden states of one sequence to what the task needs of them, so that those of a batch need not be
kept. `results` turns what was kept of the batch into one answer for each text.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine import reference
from pruneofa.engine.load import Float, Weights
from pruneofa.engine.masked_lm import MaskedLM
from pruneofa.engine.question_answering import QuestionAnswering
from pruneofa.engine.tokenizer import Text, TextTokenizer, Tokens
from pruneofa.errors import InputError, short
from pruneofa.families import POOLER
from pruneofa.formats.architecture import Architecture
from pruneofa.formats.files import read_json

Pooling = Literal["cls", "mean", "max"]

_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Classification:
    """One class, or a probability of each of several, from the first token.

    Attributes:
        labels: names of the classes by their id.
    """

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        head = architecture.family.classification
        # The pooler is pruned, so the kernels compute it.
        self._dense = weights.linear(POOLER).forward if head.dense == POOLER else weights.dense(head.dense)
        self._activation = np.tanh if head.activation == "tanh" else reference.relu
        self._out = weights.dense(head.output)
        self.labels = label_names(architecture, len(self._out.bias))
        # As transformers' pipeline decides where the config does not.
        self._problem = architecture.problem_type or (
            "multi_label_classification" if len(self.labels) == 1 else "single_label_classification"
        )

    def prepare(
        self, tokenizer: TextTokenizer, texts: Sequence[Text], names: Sequence[str], *, truncate: bool
    ) -> list[Tokens]:
        """Tokens of each text or pair."""
        return tokenizer.sequences(texts, names, truncate=truncate)

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """The first token, (hidden,)."""
        return hidden[0].copy()

    def logits(self, reduced: Sequence[Float]) -> Float:
        """(texts, classes), before any softmax."""
        rows = np.stack(reduced)
        return self._out(self._activation(self._dense(rows)))

    def results(self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[Any]) -> list[dict[str, Any]]:
        """{"label", "score", "scores": {label: score}} of each text, scores in the order of the classes.

        A score is a probability among all classes; of one class by itself when the model is multi-label or
        has a single class; and the bare output of a regression.
        """
        scores = self.logits(reduced)
        if self._problem == "single_label_classification":
            scores = reference.softmax(scores)
        elif self._problem == "multi_label_classification":
            scores = 1 / (1 + np.exp(-scores.astype(np.float64)))
        return [_best(self.labels, row) for row in scores]


class TokenClassification:
    """A class for every token of a text."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._out = weights.dense(architecture.family.token_classification)
        self._labels = label_names(architecture, len(self._out.bias))

    def prepare(
        self, tokenizer: TextTokenizer, texts: Sequence[Text], names: Sequence[str], *, truncate: bool
    ) -> list[Tokens]:
        """Tokens of each text, with their places in it."""
        return tokenizer.sequences(texts, names, truncate=truncate, chars=True)

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """Probabilities (tokens, labels)."""
        return reference.softmax(self._out(hidden))

    def results(
        self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[str]
    ) -> list[list[dict[str, Any]]]:
        """For each text a list with {"label", "score", "word", "start", "end"} of each token but the special ones."""
        results = []
        for scores, sequence, text in zip(reduced, tokens, texts, strict=True):
            assert sequence.segments is not None and sequence.chars is not None
            found = []
            for index in np.flatnonzero(sequence.segments >= 0):
                start, end = map(int, sequence.chars[index])
                label = int(np.argmax(scores[index]))
                found.append(
                    {
                        "label": self._labels[label],
                        "score": float(scores[index, label]),
                        "word": text[start:end],
                        "start": start,
                        "end": end,
                    }
                )
            results.append(found)
        return results


class Embedding:
    """One vector per text: the first token, or the mean or maximum over all tokens."""

    def __init__(self, pooling: Pooling, *, normalize: bool, dimensions: int | None = None) -> None:
        """Of a vector only the first `dimensions` numbers are given, if that is not None."""
        self._pooling = pooling
        self._normalize = normalize
        self._dimensions = dimensions

    def prepare(
        self, tokenizer: TextTokenizer, texts: Sequence[Text], names: Sequence[str], *, truncate: bool
    ) -> list[Tokens]:
        """Tokens of each text or pair."""
        return tokenizer.sequences(texts, names, truncate=truncate)

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """(hidden,), or fewer; cut after it was normalized and not normalized again, as in sentence-transformers."""
        if self._pooling == "cls":
            vector = hidden[0].copy()
        else:
            vector = hidden.mean(axis=0) if self._pooling == "mean" else hidden.max(axis=0)
        if self._normalize:
            vector = vector / max(np.linalg.norm(vector), np.float32(1e-12))
        return vector[: self._dimensions]

    def results(self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[Any]) -> list[Float]:
        """A float32 vector for each text."""
        return list(reduced)


def _best(labels: Sequence[str], scores: NDArray[np.floating]) -> dict[str, Any]:
    best = int(np.argmax(scores))
    by_label = {label: float(score) for label, score in zip(labels, scores, strict=True)}
    return {"label": labels[best], "score": float(scores[best]), "scores": by_label}


def label_names(architecture: Architecture, count: int) -> list[str]:
    """Names of `count` classes, those of config.json where it has any."""
    return list(architecture.labels) or [f"LABEL_{index}" for index in range(count)]


Head = Classification | QuestionAnswering | TokenClassification | MaskedLM | Embedding


def task_head(weights: Weights, architecture: Architecture, tokenizer: TextTokenizer) -> Head:
    """The head that the architecture names."""
    match architecture.task:
        case "classification":
            return Classification(weights, architecture)
        case "question answering":
            return QuestionAnswering(weights, architecture)
        case "token classification":
            return TokenClassification(weights, architecture)
        case "masked-LM":
            return MaskedLM(weights, architecture, tokenizer)
        case "embedding":
            return Embedding("mean", normalize=False)


def sentence_head(folder: Path) -> Embedding | None:
    """What the modules.json of a sentence-transformers folder says; None if it has none, or no pooling in it.

    Raises:
        InputError: a module or a pooling mode that is not supported.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return None
    modules = read_json(file)
    try:
        kinds = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    except (TypeError, KeyError):
        raise InputError(f"{file}: not a list of modules with type and path; copy the file again") from None
    if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise InputError(f"{file}: module {short(unknown[0])}, wanted only Transformer, Pooling and Normalize; "
                         "run this model with sentence-transformers")  # fmt: skip
    if "Pooling" not in kinds:
        return None
    name = Path(kinds["Pooling"]).name  # never a path that leads out of the folder
    if not re.fullmatch(r"[\w.-]{1,99}", name):
        raise InputError(f"{file}: the path of Pooling is {short(kinds['Pooling'])}, wanted such as '1_Pooling'; "
                         "copy the file again")  # fmt: skip
    pooling = _pooling(folder / name / "config.json")
    return Embedding(pooling, normalize="Normalize" in kinds, dimensions=_truncate_dim(folder))


def _truncate_dim(folder: Path) -> int | None:
    """How many numbers of a vector a sentence-transformers folder keeps; None: all."""
    file = folder / "config_sentence_transformers.json"
    settings = read_json(file) if file.is_file() else {}
    value = settings.get("truncate_dim") if isinstance(settings, dict) else None
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InputError(f"{file}: truncate_dim is {short(value)}, wanted an integer of at least 1 or null; "
                         "mend the file")  # fmt: skip
    return value


def _pooling(file: Path) -> Pooling:
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise InputError(f"{file}: wanted a JSON object, got {type(settings).__name__}; copy the file again")
    if settings.get("include_prompt") is False:
        raise InputError(f"{file}: include_prompt is false, wanted a model that pools its prompt too; run this model "
                         "with sentence-transformers")  # fmt: skip
    mode = settings.get("pooling_mode", [new for old, new in _OLD_POOLING.items() if settings.get(old)] or "mean")
    mode = mode[0] if isinstance(mode, list) and len(mode) == 1 else mode
    if mode not in ("cls", "mean", "max"):
        raise InputError(f"{file}: pooling is {short(mode)}, wanted one of cls, mean, max; run this model with "
                         "sentence-transformers")  # fmt: skip
    return mode
