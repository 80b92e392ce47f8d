"""SQuAD v1.1: contexts in overlapping windows, answer spans, and n-best selection."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pruneofa.data import rows
from pruneofa.engine.spans import best_span as best_span
from pruneofa.errors import InputError

_CHUNK = 1000  # rows per call of the tokenizer: enough to use every core, little enough to hold
_MIN_CONTEXT = 16  # new context tokens per window; a question that leaves fewer is cut


@dataclass(frozen=True)
class Windows:
    """Concatenated tokens of all windows.

    Attributes:
        ids: (tokens,) int32.
        types: (tokens,) uint8 segment ids, or None for models without them.
        bounds: (windows + 1,) int64, where each window begins in `ids`.
        row: (windows,) int32, the row of the table that each window comes from.
        chars: (tokens, 2) int32, begin and end of each token in the context; -1 outside the context.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8] | None
    bounds: NDArray[np.int64]
    row: NDArray[np.int32]
    chars: NDArray[np.int32]


def cut_windows(table: pa.Table, tokenizer: Any, *, max_length: int, stride: int, where: str) -> Windows:
    """Tokenize `[CLS] question [SEP] context [SEP]` in windows of `max_length` that share `stride` tokens.

    Raises:
        InputError: a column is missing, the tokenizer gives no offsets, or `stride` leaves no room.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{where}: the tokenizer has no tokenizer.json, which question answering needs for offsets")
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride - _MIN_CONTEXT
    if room < 1:
        raise InputError(f"{where}: stride {stride} leaves no room in max_length {max_length}; lower {where}.stride")
    questions = [text.lstrip() for text in rows.text_column(table, "question", where).to_pylist()]
    contexts = rows.text_column(table, "context", where).to_pylist()
    ids, types, chars, lengths, row = [], [], [], [], []
    for begin in range(0, len(questions), _CHUNK):
        batch = tokenizer(
            _shorten(questions[begin : begin + _CHUNK], tokenizer, room),
            contexts[begin : begin + _CHUNK],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            padding=False,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        row.append(np.asarray(batch["overflow_to_sample_mapping"], np.int32) + begin)
        for index, encoding in enumerate(batch.encodings):
            segments = encoding.sequence_ids
            first = segments.index(1) if 1 in segments else len(segments)
            spans = np.full((len(segments), 2), -1, np.int32)
            context = slice(first, first + segments.count(1))
            spans[context] = np.asarray(encoding.offsets, np.int32)[context]
            chars.append(spans)
            lengths.append(len(segments))
            ids.append(np.asarray(batch["input_ids"][index], np.int32))
            types.append(np.asarray(batch["token_type_ids"][index], np.uint8))
    return Windows(
        np.concatenate(ids),
        np.concatenate(types) if "token_type_ids" in tokenizer.model_input_names else None,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(row),
        np.concatenate(chars),
    )


def _shorten(questions: list[str], tokenizer: Any, room: int) -> list[str]:
    """Truncate questions to `room` tokens, so that every window has room for context."""
    suspects = [i for i, text in enumerate(questions) if len(text.encode()) > room]  # a token has >= 1 byte
    if suspects:
        batch = tokenizer(
            [questions[i] for i in suspects],
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
        )
        for i, offsets in zip(suspects, batch["offset_mapping"], strict=True):
            if len(offsets) > room:
                questions[i] = questions[i][: offsets[room - 1][1]]
    return questions


def good_answers(table: pa.Table, *, skip: bool, where: str) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows that have an answer found at its offset, and the characters it covers as (rows, 2) int64.

    Of several answers the first good one counts.

    Raises:
        InputError: a row has no such answer and `skip` is off; it gives their number and the first of them.
    """
    answers = _answers(table, where)
    contexts = rows.text_column(table, "context", where).to_pylist()
    spans = [_span(context, answer) for context, answer in zip(contexts, answers, strict=True)]
    bad = [index for index, span in enumerate(spans) if span is None]
    if bad and not skip:
        row = f"row {bad[0] + 1}"
        first = f"{table['id'][bad[0]].as_py()!r} ({row})" if "id" in table.column_names else f"in {row}"
        raise InputError(
            f"{where}: {len(bad)} of {table.num_rows} answers are not found in their context at answer_start, "
            f"first {first}; set {where}.skip_bad_answers=true to train without them"
        )
    kept = [span for span in spans if span is not None]
    if not kept:
        raise InputError(f"{where}: no answer is found in its context at answer_start; offsets count characters from 0")
    if bad:
        table = table.filter(pa.array([span is not None for span in spans]))
    return table, np.asarray(kept, np.int64)


def _answers(table: pa.Table, where: str) -> list[dict[str, list[Any]]]:
    """The lists text and answer_start of each row; a single string and a single integer are lists of one."""
    answers = rows.column(table, "answers", "answers", where)
    fields = {field.name: field.type for field in answers.type} if pa.types.is_struct(answers.type) else {}
    wanted = {"text": rows.is_text, "answer_start": pa.types.is_integer}
    if not all(name in fields and _holds(fields[name], is_wanted) for name, is_wanted in wanted.items()):
        raise InputError(
            f"{where}: column 'answers' holds {answers.type}, wanted in each row the lists text, of strings, and "
            "answer_start, of integers; write it again"
        )
    return [{name: _listed((answer or {}).get(name)) for name in wanted} for answer in answers.to_pylist()]


def _holds(kind: pa.DataType, is_wanted: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type is wanted, or that of lists of such values; lists of no type are empty in every row."""
    element = getattr(kind, "value_type", kind)
    return is_wanted(kind) or is_wanted(element) or pa.types.is_null(element)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _span(context: str, answers: dict[str, list[Any]]) -> tuple[int, int] | None:
    for text, start in zip(answers["text"], answers["answer_start"], strict=False):  # a shorter list: no answer
        if text and start is not None and start >= 0 and context[start : start + len(text)] == text:
            return start, start + len(text)
    return None


def token_spans(windows: Windows, spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """First and last token of the answer in each window, (windows, 2) int64; (0, 0) where it is not inside.

    Token 0 is `[CLS]`: windows without the answer train the model to point there, as in the official code.
    """
    result = np.zeros((len(windows.row), 2), np.int64)
    for index, row in enumerate(windows.row):
        chars = windows.chars[windows.bounds[index] : windows.bounds[index + 1]]
        inside = np.flatnonzero(chars[:, 0] >= 0)
        begin, end = spans[row]
        if len(inside) and chars[inside[0], 0] <= begin and end <= chars[inside[-1], 1]:
            first = np.searchsorted(chars[inside, 0], begin, side="right") - 1
            last = np.searchsorted(chars[inside, 1], end, side="left")
            # byte-level tokens may share a character; then the last token found can be before the first
            result[index] = inside[0] + first, inside[0] + max(first, last)
    return result


def gold_answers(table: pa.Table, where: str) -> list[list[str]]:
    """All reference texts of every row. Raises InputError for a row without one (SQuAD v2)."""
    texts = [[text for text in answer["text"] if text is not None] for answer in _answers(table, where)]
    for index, row in enumerate(texts):
        if not row:
            raise InputError(f"{where}: row {index + 1} has no answer; SQuAD v2 is not supported, only v1.1")
    return texts


def content(table: pa.Table, where: str) -> bytes:
    """The data other than tokens that determine the metrics, as bytes for a fingerprint."""
    return "\x1f".join(chain.from_iterable(gold_answers(table, where))).encode("utf-8", "surrogatepass")
