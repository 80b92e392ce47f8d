"""Task heads: the computation after the encoder, one class per task.

Every class has the same three methods. `prepare` tokenizes a batch of texts into one or more sequences each.
`reduce` maps the hidden states of one sequence to the (smaller) array that the task needs, so that the hidden states of
a batch are not all kept in memory. `results` computes one answer per text from these arrays.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine import reference
from pruneofa.engine.inputs import finite
from pruneofa.engine.load import Float, Weights
from pruneofa.engine.masked_lm import MaskedLM
from pruneofa.engine.question_answering import QuestionAnswering
from pruneofa.engine.tokenizer import Text, TextTokenizer, Tokens
from pruneofa.families import POOLER
from pruneofa.formats.architecture import Architecture
from pruneofa.formats.sentence import Pooling, Sentence


def _one_sequence_each(
    head: object, tokenizer: TextTokenizer, texts: Sequence[Text], names: Sequence[str], *, truncate: bool
) -> list[Tokens]:
    """Tokens of each text or pair."""
    return tokenizer.sequences(texts, names, truncate=truncate)


class Classification:
    """Classification of a text or pair from the hidden state of the first token.

    Attributes:
        labels: names of the classes by their id.
    """

    prepare = _one_sequence_each

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        head = architecture.family.classification
        self._dense = weights.linear(POOLER) if head.dense == POOLER else weights.dense(head.dense)
        self._activation = np.tanh if head.activation == "tanh" else reference.relu
        self._out = weights.dense(head.output)
        self.labels = label_names(architecture, self._out.shape[0])
        # The rule of transformers' pipeline: one class is never a softmax, whatever the config says.
        single = "multi_label_classification" if len(self.labels) == 1 else "single_label_classification"
        stated = architecture.problem_type
        self._problem = stated if stated not in (None, "single_label_classification") else single

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """The first token, (hidden,)."""
        return hidden[0].copy()

    def logits(self, reduced: Sequence[Float]) -> Float:
        """(texts, classes), before any softmax."""
        rows = np.stack(reduced)
        return finite(self._out.forward(self._activation(self._dense.forward(rows))))

    def results(self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[Any]) -> list[dict[str, Any]]:
        """{"label", "score", "scores": {label: score}} of each text, scores in the order of the classes.

        Scores are softmax probabilities; sigmoid probabilities of each class if the model is multi-label or has a
        single class; and the unchanged output of a regression.
        """
        return [_best(self.labels, row) for row in self.scores(self.logits(reduced))]

    def scores(self, logits: Float) -> NDArray[np.floating]:
        """What `results` reports, for logits (texts, classes)."""
        if self._problem == "single_label_classification":
            return reference.softmax(logits)
        if self._problem == "multi_label_classification":
            return reference.sigmoid(logits)
        return logits


class TokenClassification:
    """A class for every token of a text.

    Attributes:
        labels: names of the classes by their id.
    """

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._out = weights.dense(architecture.family.token_classification)
        self.labels = label_names(architecture, self._out.shape[0])

    def prepare(
        self, tokenizer: TextTokenizer, texts: Sequence[Text], names: Sequence[str], *, truncate: bool
    ) -> list[Tokens]:
        """Tokens of each text, with their character positions."""
        return tokenizer.sequences(texts, names, truncate=truncate, chars=True)

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """Probabilities (tokens, labels)."""
        return reference.softmax(self._out.forward(hidden))

    def results(
        self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[str]
    ) -> list[list[dict[str, Any]]]:
        """For each text a list of {"label", "score", "word", "start", "end"}, one per token that is not special."""
        results = []
        for scores, sequence, text in zip(reduced, tokens, texts, strict=True):
            assert sequence.segments is not None and sequence.chars is not None
            found = []
            for index in np.flatnonzero(sequence.segments >= 0):
                start, end = map(int, sequence.chars[index])
                label = int(np.argmax(scores[index]))
                found.append(
                    {
                        "label": self.labels[label],
                        "score": float(scores[index, label]),
                        "word": text[start:end],
                        "start": start,
                        "end": end,
                    }
                )
            results.append(found)
        return results


class Embedding:
    """One vector per text: the first token, or the mean or maximum over all tokens.

    Attributes:
        pooling: how the hidden states of the tokens become one vector.
        dimensions: numbers of a vector that are kept; None: all.
    """

    prepare = _one_sequence_each

    def __init__(self, pooling: Pooling, *, normalize: bool, dimensions: int | None = None) -> None:
        """Return only the first `dimensions` numbers of each vector, unless that is None."""
        self.pooling = pooling
        self._normalize = normalize
        self.dimensions = dimensions

    @classmethod
    def of(cls, sentence: Sentence) -> "Embedding":
        """The head with the settings of a sentence-transformers folder."""
        return cls(sentence.pooling, normalize=sentence.normalize, dimensions=sentence.truncate_dim)

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """(hidden,), or (dimensions,): truncated after normalization, without normalizing again, as in
        sentence-transformers.
        """
        vector = self.pool(hidden)
        if self._normalize:
            vector = reference.unit(vector)
        return vector[: self.dimensions]

    def pool(self, hidden: Float) -> Float:
        """One vector (hidden,) of the hidden states (tokens, hidden), neither truncated nor normalized."""
        if self.pooling == "cls":
            return hidden[0].copy()
        return hidden.mean(axis=0) if self.pooling == "mean" else hidden.max(axis=0)

    def results(self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[Any]) -> list[Float]:
        """A float32 vector for each text."""
        return list(reduced)


def _best(labels: Sequence[str], scores: NDArray[np.floating]) -> dict[str, Any]:
    best = int(np.argmax(scores))
    by_label = {label: float(score) for label, score in zip(labels, scores, strict=True)}
    return {"label": labels[best], "score": float(scores[best]), "scores": by_label}


def label_names(architecture: Architecture, count: int) -> list[str]:
    """Names of `count` classes: those of config.json, or LABEL_0, LABEL_1, ... if it has none."""
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
