"""Entities in a text: what its tokens are, grouped as the pipeline of transformers does, over windows of long texts."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine.heads import TokenClassification
from pruneofa.engine.load import Float
from pruneofa.engine.tokenizer import TextTokenizer, Tokens, overlap

Aggregation = Literal["none", "simple", "first", "average", "max"]


def find_entities(
    head: TokenClassification,
    tokenizer: TextTokenizer,
    text: str,
    windows: Sequence[Tokens],
    scores: Sequence[Float],
    *,
    aggregation: Aggregation = "simple",
    ignore: Sequence[str] = ("O",),
) -> list[dict[str, Any]]:
    """Entities of one text, in order.

    Args:
        head: names the labels; a B- or I- before a label says whether it begins or continues an entity.
        tokenizer: says which tokens continue a word.
        text: the text.
        windows: its windows, from `TextTokenizer.text_windows`.
        scores: probabilities (tokens, labels) of each window.
        aggregation: "none": every token; "simple": neighbouring tokens of one label; "first", "average", "max": the
            same, after the tokens of each word agreed on the label of the first, on the mean, or on the surest one.
        ignore: labels to leave out.

    Returns:
        {"entity_group", "score", "word", "start", "end"} by characters of the text, where "word" is the text between;
        "entity" in the place of "entity_group" without aggregation.
    """
    tokens, probabilities = _joined(windows, scores)
    assert tokens.chars is not None
    spans: NDArray[np.int32] = tokens.chars
    if aggregation in ("first", "average", "max"):
        begins = np.flatnonzero(~tokenizer.continues_word(tokens, text) | (np.arange(len(spans)) == 0))
        parts = np.split(np.arange(len(spans)), begins[1:]) if len(spans) else []
        spans = np.array([(spans[part[0], 0], spans[part[-1], 1]) for part in parts], np.int32).reshape(-1, 2)
        rows = [_agreed(probabilities[part], aggregation) for part in parts]
        probabilities = np.stack(rows) if rows else probabilities[:0]
    labels = [head.labels[label] for label in probabilities.argmax(axis=1)]
    found = group_tokens(text, labels, probabilities.max(axis=1, initial=0), spans, separate=aggregation == "none")
    key = "entity" if aggregation == "none" else "entity_group"
    return [{key: entity.pop("label"), **entity} for entity in found if entity["label"] not in ignore]


def group_tokens(
    text: str,
    labels: Sequence[str],
    scores: Sequence[float] | Float,
    spans: Sequence[Sequence[int]] | NDArray[np.int32],
    *,
    separate: bool = False,
) -> list[dict[str, Any]]:
    """Neighbouring tokens of one kind as one entity, unless a B- begins another; `separate`: every token as it is.

    Args:
        text: the text.
        labels: the label of each token.
        scores: its score; an entity has the mean.
        spans: its begin and end by characters of the text.
        separate: do not group, and leave labels whole.

    Returns:
        {"label", "score", "word", "start", "end"} of each entity, O included, in order.
    """
    groups: list[list[int]] = []
    for index, label in enumerate(labels):
        begins_anew, tag = _tag(label)
        last = None if not groups or separate else _tag(labels[groups[-1][-1]])[1]
        if last == tag and not begins_anew:
            groups[-1].append(index)
        else:
            groups.append([index])
    found = []
    for group in groups:
        label = labels[group[0]]
        start, end = int(spans[group[0]][0]), int(spans[group[-1]][1])
        found.append(
            {
                "label": label if separate else label.split("-", 1)[-1],
                "score": float(np.mean([scores[index] for index in group])),
                "word": text[start:end],
                "start": start,
                "end": end,
            }
        )
    return found


def _joined(windows: Sequence[Tokens], scores: Sequence[Float]) -> tuple[Tokens, Float]:
    """The text's own tokens and their scores: where windows overlap, the half that has more context on both sides."""
    own = [np.flatnonzero(window.segments == 0) for window in windows]
    shared = overlap(len(own[0])) if len(windows) > 1 else 0
    for number in range(len(windows)):
        begin = shared // 2 if number else 0
        end = len(own[number]) - (shared - shared // 2 if number + 1 < len(windows) else 0)
        own[number] = own[number][begin:end]
    parts = [window.keep(kept) for window, kept in zip(windows, own, strict=True)]
    ids, types, segments, chars = (np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS)
    return Tokens(ids, types, segments, chars), np.concatenate(
        [rows[kept] for rows, kept in zip(scores, own, strict=True)]
    )


_FIELDS = ("ids", "types", "segments", "chars")


def _agreed(scores: Float, aggregation: Aggregation) -> Float:
    """One row (labels,) for the tokens of a word, (tokens, labels)."""
    match aggregation:
        case "first":
            return scores[0]
        case "average":
            return scores.mean(axis=0)
        case _:
            return scores[int(scores.max(axis=1).argmax())]


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and the entity's kind; labels without B- or I- continue."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
