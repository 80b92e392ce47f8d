"""Columns of texts in, columns of results out: for files, and for actors of Ray Data and partitions of Spark."""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine.engine import Engine
from pruneofa.engine.entities import group_tokens
from pruneofa.engine.inputs import WANTED, check_item
from pruneofa.errors import InputError
from pruneofa.formats.delimited import other_delimiter

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TEXTS = 512  # texts per call of the engine, which sorts them by length and holds their tokens in memory
COLUMNS = {
    "classification": ("label", "score", "scores"),
    "question answering": ("answer", "start", "end", "score"),
    "token classification": ("entities",),
    "masked-LM": ("masks",),
    "embedding": ("embedding",),
}
_NUMBERS = {"score": (np.float64, np.nan), "start": (np.int64, -1), "end": (np.int64, -1)}  # type, and null of NumPy
_PARTS = {"0": "the first text", "1": "the second text", "'question'": "the question", "'context'": "the context"}
_ENTITY = "array<struct<label: string, score: double, word: string, start: bigint, end: bigint>>"
_SPARK = {
    "label": "string", "score": "double", "scores": "map<string, double>", "answer": "string", "start": "bigint",
    "end": "bigint", "entities": _ENTITY, "embedding": "array<float>",
    "masks": "array<struct<label: string, score: double, scores: map<string, double>>>",
}  # fmt: skip


class Predictor:
    """A model, the columns that it reads, and the names of those that it adds. Loaded once, called for every batch.

    Under Ray Data: `dataset.map_batches(Predictor, fn_constructor_kwargs={"model": "packed"},
    compute=ActorPoolStrategy(size=2), batch_format="pyarrow")`, where every block then has the same types.

    Attributes:
        engine: the model.
        added: names of the columns of results, in order.
    """

    def __init__(
        self,
        model: str,
        *,
        text: str | None = None,
        text_pair: str | None = None,
        question: str | None = None,
        context: str | None = None,
        prefix: str = "",
        truncate: bool = False,
        skip_bad: bool = False,
        precision: Any = "int8",
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: folder, packed or not, or hub id.
            text: column of texts; default: "text", or the only column.
            text_pair: column of the second texts of a model of pairs.
            question: column of questions, for question answering; default "question".
            context: column of contexts, for question answering; default "context".
            prefix: put before the names of the columns of results.
            truncate: cut texts that are too long instead of raising.
            skip_bad: the results of a row that the model does not accept are None, instead of an error.
            precision: as in `Engine.from_pretrained`, like `threads` and `isa`.
            threads: compute threads.
            isa: kernels.

        Raises:
            InputError: the model cannot be loaded, or has another task than these columns are for.
        """
        self.engine = Engine.from_pretrained(model, precision=precision, threads=threads, isa=isa)
        answers = self.engine.task == "question answering"
        wrong = {"text": text, "text-pair": text_pair} if answers else {"question": question, "context": context}
        for option, value in wrong.items():
            if value is not None:
                wanted = "--question and --context" if answers else "--text"
                raise InputError(f"--{option} was given, but the model's task is {self.engine.task}; give {wanted}")
        if text_pair is not None and self.engine.task == "token classification":
            raise InputError("--text-pair was given, but token classification takes single texts; omit it")
        self._names = (question or "question", context or "context") if answers else (text, text_pair)
        self._truncate, self._skip_bad = truncate, skip_bad
        self.added = [f"{prefix}{name}" for name in COLUMNS[self.engine.task]]

    @functools.cached_property
    def dimension(self) -> int:
        """Numbers of a vector of the task embedding."""
        return len(self.engine.predict("a"))

    def columns(self, found: Sequence[str], where: str = "the table") -> list[str]:
        """The one or two columns to read, of a table with the columns `found`.

        Raises InputError if one is missing, or is there twice, or a column of results is there already; messages
        begin with `where`.
        """
        first, second = self._names
        shown, wrong = ", ".join(map(repr, found)) or "none", other_delimiter(found, Path(where).suffix)
        if first is None:
            if "text" not in found and (len(found) != 1 or wrong):
                do = f"{wrong}, or name the column" if wrong else "Name it"
                raise InputError(f"{where}: which column of {shown} has the texts? {do} with --text")
            first = "text" if "text" in found else found[0]
        for name in (first, second):
            if name is None:
                continue
            if name not in found:
                near = difflib.get_close_matches(name, found, 1)
                hint = f"; did you mean {near[0]!r}?" if near else "; name another column"
                raise InputError(f"{where}: no column {name!r} among {shown}{f': {wrong}' if wrong else hint}")
            if list(found).count(name) > 1:
                raise InputError(f"{where}: the name {name!r} is that of two columns; rename one")
        self.check_added(found, where)
        return [first] if second is None else [first, second]

    def check_added(self, found: Iterable[str], where: str) -> None:
        """Raise InputError, beginning with `where`, if a column of results is among the columns `found`."""
        if taken := [name for name in self.added if name in found]:
            raise InputError(f"{where}: has a column {taken[0]!r} already; rename the results with --prefix predicted_")

    def results(self, columns: Sequence[Sequence[Any]], rows: Sequence[str]) -> list[dict[str, Any] | None]:
        """The results of each row by the names in `added`; None for a row that is skipped.

        Args:
            columns: the values of each column that `columns` named.
            rows: what messages call each row.

        Raises:
            InputError: a row is not what the model accepts, and `skip_bad` is off.
        """
        task = self.engine.task
        if task == "question answering":
            items: list[Any] = [{"question": q, "context": c} for q, c in zip(*columns, strict=True)]
        else:
            items = list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))
        results: list[dict[str, Any] | None] = [None] * len(items)
        good = []
        for index, item in enumerate(items):
            try:
                check_item(item, "x[0]", task)  # as the engine calls the one item of a list
                good.append(index)
            except InputError as error:
                self._bad(error, rows[index])
        for begin in range(0, len(good), TEXTS):
            part = good[begin : begin + TEXTS]
            for index, result in self._predict(part, items, rows):
                results[index] = dict(zip(self.added, _values(task, items[index], result), strict=True))
        return results

    def _predict(self, part: list[int], items: Sequence[Any], rows: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """(index, result) of every item of the part that the engine accepts: halves find one that is too long."""
        try:
            texts = [items[index] for index in part]
            yield from zip(part, self.engine.predict(texts, batch_size=TEXTS, truncate=self._truncate), strict=True)
        except InputError as error:
            if len(part) == 1:
                self._bad(error, rows[part[0]])
                return
            yield from self._predict(part[: len(part) // 2], items, rows)
            yield from self._predict(part[len(part) // 2 :], items, rows)

    def _bad(self, error: InputError, row: str) -> None:
        """Skip the row, or raise what is wrong with it. What is wrong with the model, and not with one item, raises."""
        found = re.match(r"x\[0\](?:\[(.+?)\])?", str(error))
        if found is None:
            raise error
        if not self._skip_bad:
            message = str(error)[found.end() :].replace(WANTED, "wanted text")
            message = message.replace("pass truncate=True", "pass --truncate")
            part = f": {_PARTS[found[1]]}" if found[1] else ""
            raise InputError(f"{row}{part}{message}; or write nulls for such rows with --skip-bad") from None

    def _columns(self, results: Sequence[dict[str, Any] | None]) -> dict[str, list[Any]]:
        return {name: [None if row is None else row[name] for row in results] for name in self.added}

    def arrow_columns(self, results: Sequence[dict[str, Any] | None]) -> "dict[str, pa.Array]":
        """Results as Arrow arrays by the names in `added`. Raises ImportError if pyarrow is missing."""
        from pruneofa.serve.arrow import result_array

        task = self.engine.task
        dimension = self.dimension if task == "embedding" else 0
        return {
            name: result_array(column, values, self.engine.labels, dimension)
            for column, (name, values) in zip(COLUMNS[task], self._columns(results).items(), strict=True)
        }

    def __call__(self, batch: Any) -> Any:
        """The batch with the columns of results: a dict of arrays, a pandas DataFrame or a pyarrow Table, as given.

        The types of these columns are the same for every batch, whatever is in it. In a Table and a DataFrame the
        results of a row that is skipped are null (`start` and `end` are Int64). NumPy has no null for numbers: in a
        dict of arrays `score` (float64) is NaN, `start` and `end` (int64) are -1, `embedding` (float32, of shape
        (rows, dimension)) is NaN; other columns are arrays of objects, in which None stands for null.

        Raises InputError as `columns` and `results` do; rows are counted from 1 within the batch.
        """
        names = list(getattr(batch, "column_names", batch))  # those of a Table; else its keys
        read = [_listed(batch[name]) for name in self.columns(names)]
        results = self.results(read, [f"row {number} of the batch" for number in range(1, len(read[0]) + 1)])
        if hasattr(batch, "column_names"):
            for name, values in self.arrow_columns(results).items():
                batch = batch.append_column(name, values)
            return batch
        added = dict(zip(COLUMNS[self.engine.task], self._columns(results).items(), strict=True))
        if isinstance(batch, Mapping):
            dimension = self.dimension if "embedding" in added else 0
            return {**batch, **{name: _array(column, each, dimension) for column, (name, each) in added.items()}}
        import pandas as pd

        types = {"label": "str", "answer": "str", "score": "float64", "start": "Int64", "end": "Int64"}
        columns = {
            name: pd.Series(each, batch.index, types.get(column, object)) for column, (name, each) in added.items()
        }
        return batch.assign(**columns)


def predict_frames(frames: Iterable["pd.DataFrame"], *, model: str, **settings: Any) -> Iterator["pd.DataFrame"]:
    """Add the columns of results to pandas DataFrames: `df.mapInPandas(partial(predict_frames, model=...), schema)`.

    A process loads the model once. `settings` are those of `Predictor`; `spark_columns` gives the schema.
    """
    predictor = _loaded(model, **settings)
    for frame in frames:
        yield predictor(frame)


@functools.lru_cache(maxsize=1)
def _loaded(model: str, **settings: Any) -> Predictor:
    return Predictor(model, **settings)


def spark_columns(model: str, **settings: Any) -> str:
    """The columns that `predict_frames` adds, as Spark writes a schema: "label string, score double, ..."."""
    predictor = _loaded(model, **settings)
    plain = COLUMNS[predictor.engine.task]
    return ", ".join(f"`{name}` {_SPARK[column]}" for name, column in zip(predictor.added, plain, strict=True))


def _values(task: str, item: Any, result: Any) -> list[Any]:
    """The values of the columns of one row."""
    if task == "token classification":
        return [entities(item, result)]
    if task in ("masked-LM", "embedding"):
        return [result]
    return [result[name] for name in COLUMNS[task]]


def entities(text: str, tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tokens of a text, from `Engine.predict`, grouped as the pipeline of transformers does: "simple".

    Neighbours of one label are an entity, unless a B- begins another; its score is their mean. O is left out.
    """
    labels, scores = ([token[key] for token in tokens] for key in ("label", "score"))
    found = group_tokens(text, labels, scores, [(token["start"], token["end"]) for token in tokens])
    return [entity for entity in found if entity["label"] != "O"]


def _listed(values: Any) -> list[Any]:
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values)


def _array(column: str, values: list[Any], dimension: int) -> NDArray[Any]:
    """The values of a column of results for NumPy, with the type of that column whatever the values are."""
    if column == "embedding":
        nulls = np.full(dimension, np.nan, np.float32)
        rows = [nulls if value is None else value for value in values]
        return np.asarray(rows, np.float32).reshape(len(rows), dimension)
    if column in _NUMBERS:
        kind, null = _NUMBERS[column]
        return np.array([null if value is None else value for value in values], kind)
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # not array[:] = values, which would look into lists
        array[index] = value
    return array
