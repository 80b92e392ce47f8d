"""Checks of the engine's inputs: arrays of token ids, and texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pruneofa.engine.tokenizer import Text, check_text
from pruneofa.errors import InputError

WANTED = "wanted a str, a pair (a, b), {'question': ..., 'context': ...}, or a list of these"  # by `predict`


def check_item(item: Any, name: str, task: str) -> Text:
    """One item of `predict` as text or a pair; (question, context) where the task is question answering.

    Raises InputError for an input that the task does not accept.
    """
    if isinstance(item, dict):
        if task != "question answering":
            raise InputError(f"{name} is a dict, but the model's task is {task}; give a str or a pair (a, b)")
        if set(item) != {"question", "context"}:
            keys = ", ".join(map(repr, item)) or "none"
            raise InputError(f"{name} has the keys {keys}; wanted exactly 'question' and 'context'")
        question = check_text(item["question"], f"{name}['question']")
        return question.lstrip() or question, check_text(item["context"], f"{name}['context']")
    if task == "question answering" and isinstance(item, (str, tuple)):
        raise InputError(
            f"{name} is {type(item).__name__}, but the model's task is question answering; "
            "give {'question': ..., 'context': ...}"
        )
    if isinstance(item, tuple):
        if task == "token classification":
            raise InputError(f"{name} is a tuple, but the model's task is token classification; give single texts")
        if len(item) != 2:
            raise InputError(f"{name} is a tuple of {len(item)}, wanted a pair (a, b) of str")
        return check_text(item[0], f"{name}[0]"), check_text(item[1], f"{name}[1]")
    if not isinstance(item, str):
        raise InputError(f"{name} is {type(item).__name__}, {WANTED}")
    return check_text(item, name)


def as_matrix(value: ArrayLike, name: str, shape: tuple[int, ...] | None = None, *, kinds: str = "iu") -> NDArray[Any]:
    """`value` as an integer array (batch, seq), of `shape` if given. Raises InputError if it is not."""
    wanted = "integers or bool" if "b" in kinds else "integers"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):  # rows of different lengths, or not numbers
        raise InputError(f"{name} is not a matrix, wanted (batch, seq) {wanted}; pad the rows to one length") from None
    if array.size and array.dtype.kind not in kinds:
        raise InputError(f"{name} has dtype {array.dtype}, wanted {wanted}; convert with .astype('int64')")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, wanted {shape}, that of input_ids")
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name} has shape {array.shape}, wanted (batch, seq), both at least 1; one row is [ids]")
    return array


def as_row(value: ArrayLike, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """`value` as an integer array (tokens,), of `shape` if given. Raises InputError if it is not."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} is not an array, wanted (tokens,) integers; give one sequence each") from None
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {array.dtype}, wanted integers; convert with .astype('int64')")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, wanted {shape}, that of input_ids")
    if array.ndim != 1 or not array.size:
        raise InputError(f"{name} has shape {array.shape}, wanted (tokens,), at least 1; omit empty sequences")
    return array


def row_lengths(mask: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Tokens of every row (batch,). Raises InputError for a mask that is not ones and then zeros."""
    if mask is None:
        return np.full(shape[0], shape[1], np.int64)
    array = as_matrix(mask, "attention_mask", shape, kinds="iub")
    if not ((array == 0) | (array == 1)).all():
        raise InputError(f"attention_mask has values from {array.min()} to {array.max()}, wanted only 0 and 1")
    lengths = np.count_nonzero(array, axis=1)
    if not lengths.all():
        row = int(np.argmin(lengths))
        raise InputError(f"attention_mask: row {row} has no token, wanted at least one; remove the row")
    gaps = (array.astype(bool) != (np.arange(shape[1]) < lengths[:, None])).any(axis=1)
    if gaps.any():
        row = int(np.argmax(gaps))
        raise InputError(
            f"attention_mask: row {row} has a 0 before a 1, wanted ones and then zeros; pad on the right, and "
            "remove tokens that are to be ignored"
        )
    return lengths


def check_range(rows: Sequence[NDArray[Any]], size: int, name: str, what: str) -> None:
    """Raise InputError for a value outside of 0 to size - 1 in one of the rows (tokens,)."""
    for index, row in enumerate(rows):
        wrong = (row < 0) | (row >= size)
        if wrong.any():
            column = int(wrong.argmax())
            raise InputError(
                f"{name}[{index}, {column}] is {row[column]}, wanted 0 to {size - 1}: {what} {size}; "
                "use the model's own tokenizer"
            )


def finite(values: NDArray[np.float32], where: str = "the batch") -> NDArray[np.float32]:
    """The values, of any shape. Raises InputError for NaN and infinity.

    Every weight is finite, but sums of products can overflow.
    """
    if not np.isfinite(values).all():
        raise InputError(
            f"{where}: its result is NaN or infinite, wanted numbers: the model's weights are too large for float32; "
            "train it again"
        )
    return values
