"""The classes of a task: the column that holds them, their names by class id, and the class ids of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pruneofa.data import rows
from pruneofa.data.labels import class_ids, distinct, labels_of_model, named
from pruneofa.errors import InputError


@dataclass(frozen=True)
class Classes:
    """The classes of a task.

    Attributes:
        column: the column that holds them.
        where: the section of the recipe, for messages.
        known: whether it is a known task, whose ids in the data are those of GLUE.
        expected: names by class id that a model or a known task has; empty for none.
        by_id: the names that the data's own file gives to class ids; None if it gives none.
        names: by class id.
        of_model: whether the names are those of a model that exists already.
    """

    column: str
    where: str
    known: bool
    expected: Sequence[str]
    by_id: list[str] | None
    names: list[str]
    of_model: bool = False

    def ids(self, table: pa.Table, split: str) -> NDArray[np.int64]:
        """Class ids, (rows,) int64. Raises InputError for a label that is none of the names; `split` names the rows."""
        values = self._values(table)
        return class_ids(values, self.column, self.names, split, self.known, self.where, self.of_model)

    def _values(self, table: pa.Table) -> list[Any]:
        """The column, with names in the place of ids whose names the data's file gives."""
        found = rows.column(table, self.column, "label", self.where).to_pylist()
        meant = rows.class_labels(table).get(self.column, self.by_id)
        return found if meant is None else named(found, meant, self.expected, self.known, self.column, self.where)


def find_classes(
    splits: Mapping[str, pa.Table],
    column: str,
    where: str,
    *,
    known: Sequence[str] = (),
    of_model: Sequence[str] | None = None,
) -> Classes:
    """The classes of the rows: those `of_model` if it has names for them, else the `known` ones, else what is found.

    Args:
        splits: the rows of "train", which may be missing, and of "", the evaluation.
        column: that of the classes.
        where: the section of the recipe, for messages.
        known: names by class id of a known task.
        of_model: names by class id of a model that exists already.

    Raises:
        InputError: the column is missing, empty, or holds something else than classes.
    """
    by_id = None if known else _names_by_id(splits, column, where)
    classes = Classes(column, where, bool(known), of_model or known, by_id, list(known))
    if of_model and (names := labels_of_model(of_model, classes._values(splits[""]), column, where)):
        return replace(classes, names=names, of_model=True)
    if known:
        return classes
    return replace(classes, names=distinct(classes._values(splits.get("train", splits[""])), column, where))


def _names_by_id(splits: Mapping[str, pa.Table], column: str, where: str) -> list[str] | None:
    """The names of class ids, which one file may say for all; None if none does."""
    found = [names for table in splits.values() if (names := rows.class_labels(table).get(column)) is not None]
    if any(names != found[0] for names in found):
        raise InputError(f"{where}: the splits have different names for their class ids; write them with the same ones")
    return found[0] if found else None
