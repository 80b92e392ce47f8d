"""The head of extractive question answering: the best span of characters over all windows of a context."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pruneofa.engine.load import Float, Weights
from pruneofa.engine.spans import best_tokens
from pruneofa.engine.tokenizer import TextTokenizer, Tokens
from pruneofa.formats.architecture import Architecture


class QuestionAnswering:
    """The best span of characters over all windows of a context."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._out = weights.dense(architecture.family.question_answering)

    def prepare(
        self, tokenizer: TextTokenizer, texts: Sequence[tuple[str, str]], names: Sequence[str], *, truncate: bool
    ) -> list[Tokens]:
        """The windows of every (question, context), in order; each has at least one."""
        return tokenizer.windows(texts, names, truncate=truncate)

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """Start and end logits, (tokens, 2)."""
        return self._out.forward(hidden)

    def logits(self, reduced: Sequence[Float]) -> list[Float]:
        """The start and end logits of each sequence, (tokens, 2), as `reduce` returned them."""
        return list(reduced)

    def results(
        self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[tuple[str, str]]
    ) -> list[dict[str, Any]]:
        """{"answer", "start", "end", "score"} of each (question, context), by characters of the context.

        The span is the official SQuAD script's: the largest sum of start and end logit over all windows. The score, 0
        to 1, is the probability of its start times that of its end, over the context's tokens of all windows together.

        Args:
            reduced: start and end logits (tokens, 2) of every window.
            tokens: the tokens of every window.
            texts: (question, context) pairs.
        """
        answers = []
        for index, (_, context) in enumerate(texts):
            own = [number for number, window in enumerate(tokens) if window.text == index]
            answers.append(_answer([reduced[number] for number in own], [tokens[number] for number in own], context))
        return answers


def _answer(logits: Sequence[Float], windows: Sequence[Tokens], context: str) -> dict[str, Any]:
    """The answer of one context from all its windows, each with (tokens, 2) start and end logits.

    Returns an empty text with score 0 if no valid span is among the best starts and ends, as in the official script.
    """
    best, best_window = (-np.inf, 0, 0), None
    context_masks = []
    for number, (pair, window) in enumerate(zip(logits, windows, strict=True)):
        assert window.segments is not None
        context_masks.append(window.segments == 1)
        found = best_tokens(pair[:, 0], pair[:, 1], context_masks[-1])
        if found is not None and found[0] > best[0]:
            best, best_window = found, number
    if best_window is None:
        return {"answer": "", "start": 0, "end": 0, "score": 0.0}
    # Both softmaxes run over the context's tokens of all windows together, so that windows are comparable.
    all_logits = np.concatenate([pair[inside] for pair, inside in zip(logits, context_masks, strict=True)]).T.astype(
        np.float64
    )
    largest = all_logits.max(axis=1)
    totals = np.exp(all_logits - largest[:, None]).sum(axis=1)
    _, first, last = best
    chosen = np.array([logits[best_window][first, 0], logits[best_window][last, 1]], np.float64)
    score = float(np.prod(np.exp(chosen - largest) / totals))
    chars = windows[best_window].chars
    assert chars is not None
    start, end = int(chars[first, 0]), int(chars[last, 1])
    return {"answer": context[start:end], "start": start, "end": end, "score": score}
