"""Labels: values of a column as text, and text as class ids."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.errors import InputError
from pruneofa.progress import notice

_NUMBER = r"[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?"
_NO_NUMBER = ("nan", "inf", "-inf")  # how a missing or infinite score is written
_NAME = 60  # mean characters of labels; longer ones are texts
_WHOLE = r"[-+]?\d+\.0+"  # a whole number written as a decimal


def as_text(value: Any) -> str:
    """A label of any type as text; 1, 1.0, "1" and "1.0" are the same label."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    name = str(value).strip()
    return str(int(name.partition(".")[0])) if re.fullmatch(_WHOLE, name) else name


def label_names(values: Sequence[Any], column: str, where: str, known: Sequence[str] = ()) -> list[str]:
    """The labels of a column as text.

    Raises InputError for an empty value, for a list of labels, and for numbers that are not class ids unless they are
    `known` labels; `column` and `where` are for the error message.
    """
    names = [_label_name(value, row, column, where) for row, value in enumerate(values, 1)]
    if set(names) <= set(known):
        return names
    if all(name[0] == "[" and name[-1] == "]" for name in names):
        raise _several("list", 1, column, where)
    if all(re.fullmatch(_NUMBER, name) or name.lower() in _NO_NUMBER for name in names):
        for row, name in enumerate(names, 1):
            if name.lower() not in _NO_NUMBER and not float(name.replace(",", ".")).is_integer():
                raise _regression(name, row, column, where)
    return names


def distinct(values: Sequence[Any], column: str, where: str) -> list[str]:
    """The classes that a column holds, sorted: whole numbers by value, anything else as text."""
    found = label_names(values, column, where)
    refuse_row_ids(found, column, where)
    names = set(found)
    if 10 <= len(names) == len(found):
        notice(
            f"pruneofa: warning: {where}: label column {column!r} has {len(names)} classes for {len(names)} rows; "
            f"set {where}.label to the column of the classes if it is another"
        )
    if not _whole(names):
        return sorted(names)
    ordered = sorted(names, key=int)
    if ordered[0] == "-1" and ordered[1:] == [str(index) for index in range(len(ordered) - 1)] and len(ordered) > 2:
        notice(
            f"pruneofa: warning: {where}: label -1 in {found.count('-1')} of {len(found)} rows is a class of its own; "
            "in data sets of the hub it stands for no label: remove these rows if it does here"
        )
    return ordered


def refuse_row_ids(names: Sequence[str], column: str, where: str) -> None:
    """Raises InputError for ten or more labels that all differ and are numbers, as row ids are, or long, as texts are.

    Names may be those of one example per class.
    """
    texts = sum(map(len, names)) > _NAME * len(names)
    if 10 <= len(names) == len(set(names)) and (texts or _whole(names)):
        raise InputError(
            f"{where}: label column {column!r} has {len(names)} classes for {len(names)} rows: looks like "
            f"{'a column of texts' if texts else 'an id column'}; set {where}.label to the column of the classes"
        )


def _whole(names: Iterable[str]) -> bool:
    return all(name.lstrip("-").isdecimal() for name in names)


def unnamed(labels: Sequence[str]) -> bool:
    """Whether the classes of a model were never named: transformers calls them LABEL_0, LABEL_1, ..."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(labels))


def numbered(labels: Sequence[str]) -> bool:
    """Whether numbers mean the classes of a model: they were never named, or are called 0, 1, ..."""
    return unnamed(labels) or list(labels) == [str(index) for index in range(len(labels))]


def named(
    ids: Sequence[Any], names: Sequence[str], labels: Sequence[str], known: bool, column: str, where: str
) -> list[Any]:
    """Class ids by their `names` in the data; -1, which stands for no label, becomes None but for a `known` task.

    Names stay what they are. Ids stay numbers where `labels` are not these names and numbers mean them: the labels of
    a `known` task, and of a model without names or trained on numbers.

    Raises InputError for a number that is not the id of a name.
    """
    given = [None if value is None else value if isinstance(value, int) else as_text(value) for value in ids]
    if any(isinstance(value, str) and (value in names or not re.fullmatch(r"-?\d+", value)) for value in given):
        return list(ids)  # names already, as another split may have them
    ids = [None if value is None else int(value) for value in given]
    if labels and (known or numbered(labels)) and not set(names) <= set(labels):
        return list(ids)
    for row, index in enumerate(ids, 1):
        if index is not None and not -1 <= index < len(names):
            raise InputError(
                f"{where}: label {index} in row {row} of column {column!r} is none of the ids 0 to {len(names) - 1} of "
                f"the file's names {some(names)}; write the file again"
            )
    missing = -1 if known else None
    return [missing if index is None or index < 0 else names[index] for index in ids]


def labels_of_model(labels: Sequence[str], values: Sequence[Any], column: str, where: str) -> list[str] | None:
    """The labels of a model; None if they were never named and the column has names."""
    if not unnamed(labels):
        return list(labels)
    numbers = {str(index) for index in range(len(labels))}
    found = set(label_names(values, column, where, labels))
    return list(labels) if found <= numbers or found <= set(labels) else None


def class_ids(
    values: Sequence[Any], column: str, labels: list[str], split: str, known: bool, where: str, of_model: bool = False
) -> NDArray[np.int64]:
    """Class ids, (rows,) int64; the labels of a `known` task may be names or the numbers of GLUE.

    Labels `of_model` may be its class ids where none of its names is found, or differ from its names in case.
    Raises InputError for a label that is not one of `labels`; `split` is what it calls the rows.
    """
    numbers = {str(index): index for index in range(len(labels))}
    ids = {label: index for index, label in enumerate(labels)}
    ids |= {as_text(label): index for label, index in ids.items() if re.fullmatch(_WHOLE, label)}
    if known:
        ids |= numbers
    names = label_names(values, column, where, labels)
    found = set(names)
    if of_model and found <= set(numbers) and not found & set(ids):
        ids = numbers
        meant = some([f"{index} = {label}" for index, label in enumerate(labels)])
        notice(f"{where}: labels {some(sorted(found, key=int))} of the {split} rows are taken as class ids: {meant}")
    elif of_model and len(lower := {label.lower(): index for index, label in enumerate(labels)}) == len(labels):
        ids = {name: lower[name.lower()] for name in found if name.lower() in lower} | ids
    unknown = next(((row, name) for row, name in enumerate(names, 1) if name not in ids), None)
    if unknown is None:
        return np.fromiter((ids[name] for name in names), np.int64, len(names))
    row, name = unknown
    if known and name == "-1":
        raise InputError(f"{where}: label -1 in {split} row {row}: the split has no labels; use another")
    raise InputError(f"{where}: label {name!r} in {split} row {row} is unknown; wanted one of {some(labels)}")


def some(names: Sequence[str]) -> str:
    """The first ten of the names, for a message."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _label_name(value: Any, row: int, column: str, where: str) -> str:
    if isinstance(value, list | tuple | dict):
        raise _several(type(value).__name__, row, column, where)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise InputError(
                f"{where}: label column {column!r} holds bytes that are not UTF-8 in row {row}, wanted strings or "
                "numbers; write the file again"
            ) from None
    if value is None or (isinstance(value, float) and math.isnan(value)) or not (name := as_text(value)):
        raise InputError(f"{where}: label column {column!r} is empty in row {row}; remove the row")
    if isinstance(value, float) and not value.is_integer():
        raise _regression(name, row, column, where)
    if not name.isprintable() and any(unicodedata.category(character) == "Cc" for character in name):
        raise InputError(
            f"{where}: label {name!r} in row {row} of column {column!r} has a control character; write the file again"
        )
    return name


def _several(kind: str, row: int, column: str, where: str) -> InputError:
    return InputError(
        f"{where}: label column {column!r} holds a {kind} in row {row}, wanted one class per row; "
        "multi-label classification is not supported yet"
    )


def _regression(name: str, row: int, column: str, where: str) -> InputError:
    return InputError(
        f"{where}: label column {column!r} holds the number {name} in row {row}, wanted classes; "
        "regression is not supported yet"
    )
