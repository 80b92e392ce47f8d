"""The best answer span, by the rule of the official SQuAD script. The engine and `evaluate` both use it."""

import numpy as np
from numpy.typing import NDArray

N_BEST = 20
MAX_ANSWER_LENGTH = 30  # tokens


def best_span(
    start: NDArray[np.floating],
    end: NDArray[np.floating],
    chars: NDArray[np.int32],
    *,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> tuple[float, int, int] | None:
    """Best (score, first character, last character + 1) of one window, or None without a valid span.

    The score is the sum of the two logits, so that the scores of windows are comparable. Candidates are the `n_best`
    starts and ends among context tokens.

    Args:
        start: (tokens,) start logits.
        end: (tokens,) end logits.
        chars: (tokens, 2) first character and last character + 1 of each token, -1 outside the context.
    """
    found = best_tokens(start, end, chars[:, 0] >= 0, n_best=n_best, max_answer_length=max_answer_length)
    return None if found is None else (found[0], int(chars[found[1], 0]), int(chars[found[2], 1]))


def best_tokens(
    start: NDArray[np.floating],
    end: NDArray[np.floating],
    inside: NDArray[np.bool_],
    *,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> tuple[float, int, int] | None:
    """Like `best_span`, but returns (score, first token, last token); `inside`, bool (tokens,), marks the context."""
    context = np.flatnonzero(inside)
    starts = context[np.argsort(-start[context], kind="stable")[:n_best]]
    ends = context[np.argsort(-end[context], kind="stable")[:n_best]]
    scores = start[starts][:, None] + end[ends][None, :]
    tokens = ends[None, :] - starts[:, None] + 1
    scores = np.where((tokens >= 1) & (tokens <= max_answer_length), scores, -np.inf)
    if not np.isfinite(scores).any():
        return None
    first, last = np.unravel_index(np.argmax(scores), scores.shape)
    return float(scores[first, last]), int(starts[first]), int(ends[last])
