"""What comes after the encoder, one class per task.

Every class has the same two methods. `reduce` takes the hidden states of one sequence to what the task needs
of them, so that those of a batch need not be kept; `results` turns what was kept of a batch into answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine import reference
from pruneofa.engine.architectures import Architecture, Weights, build_encoder, read_architecture
from pruneofa.engine.spans import best_tokens
from pruneofa.engine.tokenizer import Tokens
from pruneofa.errors import InputError
from pruneofa.formats.packed import Packed, PackedEmbedding
from pruneofa.formats.sentence import Pooling, Sentence, read_sentence

Float = NDArray[np.float32]

TOP_TOKENS = 5  # of a masked position, as transformers' fill-mask pipeline gives
_VOCABULARY_BLOCK = 4096  # rows of the word embeddings that are widened to float32 at a time


@dataclass(frozen=True)
class Dense:
    """A float32 linear layer of a head: weight (outputs, inputs) and bias (outputs,)."""

    weight: Float
    bias: Float

    @classmethod
    def read(cls, weights: Weights, name: str, outputs: int, inputs: int) -> "Dense":
        """NAME.weight and NAME.bias; -1 outputs stand for any number."""
        weight = weights.plain(f"{name}.weight", outputs, inputs)
        return cls(weight, weights.plain(f"{name}.bias", len(weight)))

    def __call__(self, x: Float) -> Float:
        """(rows, inputs) to (rows, outputs)."""
        return x @ self.weight.T + self.bias


class Classification:
    """One class, or a probability of each of several, from the first token.

    Attributes:
        labels: names of the classes by their id.
    """

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        hidden, family = architecture.hidden, architecture.family
        self._pooler = None
        if family == "bert":
            self._pooler = weights.linear("pooler.dense", hidden, hidden)
        else:
            self._dense = Dense.read(
                weights, "pre_classifier" if family == "distilbert" else "classifier.dense", hidden, hidden
            )
        self._activation = reference.relu if family == "distilbert" else np.tanh
        self._out = Dense.read(weights, "classifier.out_proj" if family == "roberta" else "classifier", -1, hidden)
        self.labels = label_names(architecture, len(self._out.bias))
        # As transformers' pipeline decides where the config does not.
        self._problem = architecture.problem_type or (
            "multi_label_classification" if len(self.labels) == 1 else "single_label_classification"
        )

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """The first token, (hidden,)."""
        return hidden[0].copy()

    def logits(self, reduced: Sequence[Float]) -> Float:
        """(texts, classes), before any softmax."""
        rows = np.stack(reduced)
        inner = self._dense(rows) if self._pooler is None else self._pooler.forward(rows)
        return self._out(self._activation(inner))

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


class QuestionAnswering:
    """The best span of characters over all windows of a context."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._out = Dense.read(weights, "qa_outputs", 2, architecture.hidden)

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """Start and end logits, (tokens, 2)."""
        return self._out(hidden)

    def results(
        self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[Any], owners: Sequence[int]
    ) -> list[dict[str, Any]]:
        """{"answer", "start", "end", "score"} of each (question, context), by characters of the context.

        The span is the official SQuAD script's: the largest sum of start and end logit over all windows. The score, 0
        to 1, is the probability of its start times that of its end, over the context's tokens of all windows together.

        Args:
            reduced: of every window; `tokens` likewise.
            texts: (question, context) pairs.
            owners: for each window the index of its pair; every pair has one.
        """
        answers = []
        for index, (_, context) in enumerate(texts):
            own = [number for number, owner in enumerate(owners) if owner == index]
            answers.append(_answer([reduced[number] for number in own], [tokens[number] for number in own], context))
        return answers


def _answer(logits: Sequence[Float], windows: Sequence[Tokens], context: str) -> dict[str, Any]:
    """The answer of one context from all its windows, each with (tokens, 2) start and end logits.

    No text and score 0 where no valid span is among the best starts and ends, as in the official script.
    """
    best, place = (-np.inf, 0, 0), None
    insides = []
    for number, (pair, window) in enumerate(zip(logits, windows, strict=True)):
        assert window.segments is not None
        insides.append(window.segments == 1)
        found = best_tokens(pair[:, 0], pair[:, 1], insides[-1])
        if found is not None and found[0] > best[0]:
            best, place = found, number
    if place is None:
        return {"answer": "", "start": 0, "end": 0, "score": 0.0}
    # Both softmaxes are over the context's tokens in all windows together: the probabilities of windows compare.
    every = np.concatenate([pair[inside] for pair, inside in zip(logits, insides, strict=True)]).T.astype(np.float64)
    largest = every.max(axis=1)
    totals = np.exp(every - largest[:, None]).sum(axis=1)
    _, first, last = best
    chosen = np.array([logits[place][first, 0], logits[place][last, 1]], np.float64)
    score = float(np.prod(np.exp(chosen - largest) / totals))
    chars = windows[place].chars
    assert chars is not None
    start, end = int(chars[first, 0]), int(chars[last, 1])
    return {"answer": context[start:end], "start": start, "end": end, "score": score}


class TokenClassification:
    """A class for every token of a text."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._out = Dense.read(weights, "classifier", -1, architecture.hidden)
        self._labels = label_names(architecture, len(self._out.bias))

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


# Dense layer, LayerNorm, decoder and the names its bias may have, which is stored once or twice.
_MASKED_LM = {
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector", ("vocab_projector.bias",)),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", ("lm_head.bias", "lm_head.decoder.bias")),
}


class MaskedLM:
    """The likeliest tokens at each mask; the vocabulary is computed there only."""

    def __init__(self, weights: Weights, architecture: Architecture, tokenizer: Any) -> None:
        dense, norm, decoder, biases = _MASKED_LM[architecture.family]
        hidden = architecture.hidden
        self._dense = Dense.read(weights, dense, hidden, hidden)
        self._norm = weights.norm(norm, hidden)
        self._epsilon = architecture.epsilon
        # RoBERTa's head has its activation in its code, not in the config.
        self._activation = reference.ACTIVATIONS[
            "gelu" if architecture.family == "roberta" else architecture.activation
        ]
        self._tied: PackedEmbedding = weights.table("word", -1, hidden)
        rows = len(self._tied.values)
        own = f"{decoder}.weight"
        self._decoder = weights.plain(own, rows, hidden) if weights.has(own) else None
        bias = next((name for name in biases if weights.has(name)), biases[0])
        self._bias = weights.plain(bias, rows)
        self._tokenizer = tokenizer

    def check(self, tokens: Tokens, name: str) -> None:
        """Raise InputError if there is no mask in a text, or the tokenizer knows of none."""
        if self._tokenizer.mask_id is None:
            raise InputError(
                "the tokenizer has no mask token to fill in; name it as mask_token in tokenizer_config.json"
            )
        if not (tokens.ids == self._tokenizer.mask_id).any():
            mask = self._tokenizer.token(self._tokenizer.mask_id)
            raise InputError(f"{name} has no {mask}, which this masked-LM fills in; put {mask} where a word is wanted")

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """The masked positions, (masks, hidden)."""
        return hidden[tokens.ids == self._tokenizer.mask_id]

    def results(
        self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[Any]
    ) -> list[list[dict[str, Any]]]:
        """For each text a list with {"label", "score", "scores": {token: score}} of each mask, best tokens first."""
        probabilities = iter(reference.softmax(self._logits(np.concatenate(reduced))))
        return [[self._best_tokens(next(probabilities)) for _ in masks] for masks in reduced]

    def _logits(self, x: Float) -> Float:
        x = reference.layer_norm(self._activation(self._dense(x)), *self._norm, self._epsilon)
        if self._decoder is not None:
            return x @ self._decoder.T + self._bias
        blocks = []
        for begin in range(0, len(self._bias), _VOCABULARY_BLOCK):
            ids = np.arange(begin, min(begin + _VOCABULARY_BLOCK, len(self._bias)), dtype=np.int32)
            blocks.append(x @ self._tied.rows(ids).T)
        return np.concatenate(blocks, axis=1) + self._bias

    def _best_tokens(self, scores: Float) -> dict[str, Any]:
        best: dict[str, float] = {}
        for index in np.argsort(-scores, kind="stable"):
            best.setdefault(self._tokenizer.token(int(index)), float(scores[index]))  # parts of a character look alike
            if len(best) == TOP_TOKENS:
                break
        label = next(iter(best))
        return {"label": label, "score": best[label], "scores": best}


class Embedding:
    """One vector per text: the first token, or the mean or maximum over all tokens."""

    def __init__(self, pooling: Pooling, *, normalize: bool, dimensions: int | None = None) -> None:
        """Of a vector only the first `dimensions` numbers are given, if that is not None."""
        self._pooling = pooling
        self._normalize = normalize
        self._dimensions = dimensions

    @classmethod
    def of(cls, sentence: Sentence) -> "Embedding":
        """As a sentence-transformers folder says."""
        return cls(sentence.pooling, normalize=sentence.normalize, dimensions=sentence.truncate_dim)

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
    """Names of `count` classes. Raises InputError if the config names another number of them."""
    if not architecture.labels:
        return [f"LABEL_{index}" for index in range(count)]
    if len(architecture.labels) != count:
        raise InputError(
            f"the classifier has {count} classes, id2label in config.json names {len(architecture.labels)}; "
            "weights and config belong to different models"
        )
    return list(architecture.labels)


Head = Classification | QuestionAnswering | TokenClassification | MaskedLM | Embedding


def task_head(weights: Weights, architecture: Architecture, tokenizer: Any) -> Head:
    """The head that the architecture names. Raises InputError if its weights are missing or of another shape."""
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


def check_runs(packed: Packed) -> None:
    """Put encoder and head together as the engine does, but without kernels; `packed` stays as it is.

    Raises:
        InputError: the engine would refuse this model.
    """
    architecture = read_architecture(packed.config, packed.folder)
    unbuilt = SimpleNamespace(Linear=lambda *_: None, Encoder=lambda **_: None)
    weights = Weights(replace(packed, linears=dict(packed.linears)), unbuilt, "")
    build_encoder(unbuilt, weights, architecture, threads=1, isa="")
    if read_sentence(packed.folder) is None:
        task_head(weights, architecture, None)
