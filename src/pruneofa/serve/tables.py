"""Files of rows, read by chunks and written by parts that are joined: CSV and TSV, JSON lines, parquet."""

import base64
import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from pruneofa.errors import InputError
from pruneofa.formats.delimited import literal_quotes, read_fields
from pruneofa.formats.json_lines import parse_line

if TYPE_CHECKING:
    from pruneofa.serve.predictor import Predictor

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def check_file(path: Path) -> None:
    """Raises InputError unless `path` is a file with one of SUFFIXES, and ImportError if pyarrow is missing for it."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: got {path.suffix or 'no suffix'!r}, wanted {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        import pruneofa.serve.arrow  # noqa: F401 - says what to install


def describe(path: Path) -> tuple[list[str], int]:
    """Names of the columns, in JSON lines those that any row has, and the number of rows.

    Reads text from beginning to end, so a line that is no row is known at once.
    """
    if path.suffix == ".parquet":
        from pruneofa.serve import arrow

        return arrow.describe(path)
    if path.suffix == ".jsonl":
        columns, count = dict[str, None](), 0
        for count, line in enumerate(_json_lines(path), 1):
            columns |= dict.fromkeys(parse_line(line, f"{path}: row {count}"))
        return list(columns), count
    rows = _fields(path)
    return next(rows), sum(1 for _ in rows)


def chunks(path: Path, size: int) -> Iterator[tuple[int, Any]]:
    """(number of the first row from 0, chunk) of at most `size` rows each; one of no rows if there are none.

    The same file is always cut at the same rows. A chunk, which `Rows` understands, is a record batch of parquet;
    otherwise a list of lines of JSON, or of lists of fields.
    """
    start = 0
    if path.suffix == ".parquet":
        from pruneofa.serve import arrow

        for batch in arrow.batches(path, size):
            yield start, batch
            start += len(batch)
        return
    rows: Iterator[Any] = _json_lines(path) if path.suffix == ".jsonl" else islice(_fields(path), 1, None)
    while (chunk := list(islice(rows, size))) or not start:
        yield start, chunk
        start += max(len(chunk), 1)


class Rows:
    """A chunk of a file, understood: its columns, and its rows with results written as a part."""

    def __init__(self, chunk: Any, path: Path, start: int, columns: Sequence[str]) -> None:
        """`columns` are those of `describe`. Raises InputError for a line that is not a JSON object."""
        self.names = [f"{path}: row {start + number}" for number in range(1, len(chunk) + 1)]
        self._path, self._columns = path, columns
        self._batch = None
        if path.suffix == ".parquet":
            self._batch = chunk
        elif path.suffix == ".jsonl":
            self._rows = [parse_line(line, name) for line, name in zip(chunk, self.names, strict=True)]
        else:
            self._rows = [dict(zip(columns, fields, strict=True)) for fields in chunk]

    def column(self, name: str) -> list[Any]:
        """The values of a column; None where a JSON object lacks it. Raises InputError for one that is not readable."""
        if self._batch is not None:
            from pruneofa.serve import arrow

            return arrow.column(self._batch, name, self.names)
        return [row.get(name) for row in self._rows]

    def write(
        self,
        part: Path,
        suffix: str,
        header: Sequence[str],
        predictor: "Predictor",
        results: Sequence[dict[str, Any] | None],
    ) -> None:
        """Write the rows with their results to a file in the format of `suffix`; `header` orders the columns of CSV.

        Raises InputError for rows that the format cannot hold, or that have a column of results already.
        """
        empty = dict.fromkeys(predictor.added)
        filled = [empty if result is None else result for result in results]
        if suffix == ".parquet":
            from pruneofa.serve import arrow

            given = self._readable(predictor, results) if self._batch is None else self._batch
            arrow.write_part(part, given, self._columns, predictor.arrow_columns(results), self.names)
            return
        given = self._rows if self._batch is None else self._batch_rows()
        with open(part, "w", encoding="utf-8", newline="") as file:
            if suffix == ".jsonl":
                file.writelines(f"{_object(row | result)}\n" for row, result in zip(given, filled, strict=True))
            else:
                self._write_header(file, suffix, [*header, *predictor.added])
                self._write_fields(file, suffix, header, given, filled)

    def _batch_rows(self) -> list[dict[str, Any]]:
        from pruneofa.serve import arrow

        return arrow.rows(self._batch, self.names)

    def _readable(self, predictor: "Predictor", results: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
        """The rows, for parquet: in a column of texts it needs one type, so other values of skipped rows are JSON."""
        if None not in results:
            return self._rows
        texts = predictor.columns(self._columns, str(self._path))
        return [
            row | {name: _json(row[name]) for name in texts if not isinstance(row.get(name), str | None)}
            for row in self._rows
        ]

    def _write_header(self, file: Any, suffix: str, names: Sequence[str]) -> None:
        try:
            _writer(file, _DELIMITERS[suffix]).writerow(names)
            file.write("\n")
        except UnicodeEncodeError:
            raise InputError(
                f"{self._path}: the name of a column has half of a surrogate pair, which {suffix} cannot hold; "
                "choose a .jsonl --out"
            ) from None

    def _write_fields(self, file: Any, suffix: str, header: Sequence[str], given: Any, results: Any) -> None:
        delimiter = _DELIMITERS[suffix]
        writer = _writer(file, delimiter)
        quote = '"' if delimiter == "," else ""  # around a vector, which holds commas
        for name, row, result in zip(self.names, given, results, strict=True):
            if row.keys() != set(header):
                raise InputError(
                    f"{name} has the columns {', '.join(map(repr, row))}, the file {', '.join(map(repr, header))}; "
                    f"{suffix} needs the same in every row: choose a .jsonl --out"
                )
            try:
                *values, last = *(row[column] for column in header), *result.values()
                if isinstance(last, np.ndarray):  # csv asks of each character whether to quote it
                    writer.writerow(map(_cell, values))
                    file.write(f"{delimiter}{quote}{_vector(last)}{quote}\n")
                else:
                    writer.writerow(map(_cell, (*values, last)))
                    file.write("\n")
            except UnicodeEncodeError:
                raise InputError(
                    f"{name} has half of a surrogate pair, which {suffix} cannot hold; choose a .jsonl --out"
                ) from None


class _WithoutEnd:
    """A file for the rows of a csv writer, without the ends of their lines.

    csv quotes a line break only if it is in the end of its lines, so that has to be both: CR LF.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row[:-2])


def _writer(file: Any, delimiter: str) -> Any:
    return csv.writer(_WithoutEnd(file), delimiter=delimiter, lineterminator="\r\n")


def join(parts: Sequence[Path], file: Any) -> None:
    """Write the rows of parts of one format, in order, to an open binary file. Raises InputError as `write` does."""
    suffix = parts[0].suffix
    if suffix == ".parquet":
        from pruneofa.serve import arrow

        arrow.join(parts, file)
        return
    for number, part in enumerate(parts):
        with open(part, "rb") as rows:
            if number and suffix in _DELIMITERS:
                _skip_header(rows)
            shutil.copyfileobj(rows, file, 1 << 20)


def _skip_header(rows: BinaryIO) -> None:
    """Read one line, or more where a quoted name contains a line break: until quotes are even."""
    quotes = 0
    for line in iter(rows.readline, b""):
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            return


def _json_lines(path: Path) -> Iterator[str]:
    """Lines that are not blank."""
    return (line for line in _lines(path, newline="\n") if not line.isspace())


def _lines(path: Path, newline: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a block); convert it") from None


def _fields(path: Path) -> Iterator[list[str]]:
    """The header, then the fields of each row."""
    tabs = path.suffix == ".tsv"
    literal = tabs and literal_quotes(_lines(path, newline=""))
    yield from read_fields(_lines(path, newline=""), path, tabs=tabs, literal=literal)


def _vector(values: NDArray[np.float32]) -> str:
    """A float32 vector as JSON, each number with the fewest digits that restore its bits."""
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _object(row: dict[str, Any]) -> str:
    """A row as JSON, vectors last."""
    text = _json({name: value for name, value in row.items() if not isinstance(value, np.ndarray)})
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            text = f"{text[:-1]}{', ' if len(text) > 2 else ''}{_json(name)}: {_vector(value)}}}"
    return text


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:  # NaN or infinite, for which JSON has no notation
        value = json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)
        text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(value, default=_plain)
    return text


def _plain(value: Any) -> str:
    """A value as text that JSON has no type for, such as dates and decimals; bytes are base64 unless they are UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def _cell(value: Any) -> Any:
    """A value as CSV has it: lists and objects as JSON, nothing for None."""
    if isinstance(value, bytes):
        return _plain(value)
    text = _json(value) if isinstance(value, dict | list) else value
    if isinstance(text, str):
        text.encode()
    return text
