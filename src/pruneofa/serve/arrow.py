"""Results as Arrow columns, and parquet files by batches of rows. Needs pyarrow, of the extra predict."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

from pruneofa.errors import InputError, first_line

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise ImportError("parquet needs pyarrow: pip install 'pruneofa[predict]'") from None

# What Arrow raises for values and types; errors of the disk and of memory are others.
_WRONG = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, pa.ArrowCapacityError, pa.ArrowKeyError)
_JSON = "choose a .jsonl --out"


def result_array(column: str, values: Sequence[Any], labels: Sequence[str], dimension: int) -> pa.Array:
    """The values of a column of results, with the type of that column whatever the values are.

    `labels` are those of a classifier, `dimension` that of its vectors for an embedding.
    """
    if column == "masks":  # Arrow writes a map as pairs
        values = [
            row and [{**mask, "scores": list(mask["scores"].items())} for mask in row] if row is not None else None
            for row in values
        ]
    return pa.array(values, _type(column, labels, dimension))


def _type(column: str, labels: Sequence[str], dimension: int) -> pa.DataType:
    score = pa.float64()
    match column:
        case "label" | "answer":
            return pa.string()
        case "start" | "end":
            return pa.int64()
        case "scores":
            return pa.struct({label: score for label in labels})
        case "entities":
            text, place = pa.string(), pa.int64()
            return pa.list_(pa.struct({"label": text, "score": score, "word": text, "start": place, "end": place}))
        case "masks":
            return pa.list_(pa.struct({"label": pa.string(), "score": score, "scores": pa.map_(pa.string(), score)}))
        case "embedding":
            return pa.list_(pa.float32(), dimension)
        case _:
            return score


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as parquet ({first_line(error)})") from None


def describe(path: Path) -> tuple[list[str], int]:
    """Names of the columns, and the number of rows. Raises InputError if two columns have one name."""
    with _open(path) as file:
        names, count = _schema(file, path).names, file.metadata.num_rows
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: the name {twice!r} is that of two columns; rename one")
    return names, count


def _schema(file: pq.ParquetFile, path: Path) -> pa.Schema:
    try:
        return file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as parquet ({first_line(error)})") from None


def check_types(files: Mapping[Path, tuple[Sequence[str], int]]) -> None:
    """Raises InputError if a column of parquet and CSV files has types that have none in common.

    Args:
        files: columns and number of rows of each, as `tables.describe` returns them. What is in a .jsonl is known
            only when it is read: see `Types`. A file without rows has no values whose type could matter.
    """
    known: dict[str, tuple[pa.DataType, Path]] = {}
    for path, (columns, count) in files.items():
        if not count:
            continue
        fields = []
        if path.suffix == ".parquet":
            with _open(path) as file:
                fields = [(field.name, field.type) for field in _schema(file, path)]
        elif path.suffix != ".jsonl":
            fields = [(name, pa.string()) for name in columns]
        for name, given in fields:
            before, where = known.get(name, (given, path))
            common = _common(before, given)
            if common is None:
                raise InputError(
                    f"{path}: column {name!r} is {_shown(given)}, {_shown(before)} in {where}; parquet needs one type: "
                    "choose a folder or .jsonl as --out"
                )
            known[name] = common, where if common == before else path


def _shown(given: pa.DataType) -> str:
    return str(given)[:60]


def _common(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both, as far as types tell; None if there is none."""
    values = [each.value_type if pa.types.is_dictionary(each) else each for each in (one, two)]
    for types in ([one, two], values):  # a dictionary, pandas' categories, has no type in common with plain values
        schemas = [pa.schema([("column", each)]) for each in types]
        with contextlib.suppress(*_WRONG):
            return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    return None


def batches(path: Path, rows: int) -> Iterator[pa.RecordBatch]:
    """The file in batches of at most `rows`, the same every time; one without rows if there are none.

    Raises InputError for a file that is not readable as parquet.
    """
    with _open(path) as file:
        try:
            if not file.metadata.num_rows:
                yield pa.RecordBatch.from_pylist([], _schema(file, path))
            yield from (batch for batch in file.iter_batches(batch_size=rows) if len(batch))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not readable as parquet ({first_line(error)})") from None


def column(batch: pa.RecordBatch, name: str, rows: Sequence[str]) -> list[Any]:
    """The values of a column as Python objects.

    Args:
        batch: rows of a file.
        name: of the column.
        rows: what messages call each row.

    Raises:
        InputError: a value has no counterpart in Python, such as text that is not UTF-8, or a date after 9999.
    """
    values = batch.column(name)
    try:
        return values.to_pylist()
    except (*_WRONG, ValueError, OverflowError, KeyError) as whole:
        for row, value in zip(rows, values, strict=True):
            try:
                value.as_py()
            except (*_WRONG, ValueError, OverflowError, KeyError) as error:
                raise InputError(
                    f"{row}: column {name!r} is not readable ({first_line(error)}); write the file again without it"
                ) from None
        raise whole


def rows(batch: pa.RecordBatch, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a batch as dicts. Raises InputError as `column` does; `names` are what messages call each row."""
    keys = batch.schema.names
    columns = [column(batch, key, names) for key in keys]
    return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]


def write_part(
    path: Path, given: Any, columns: Sequence[str], results: dict[str, pa.Array], names: Sequence[str]
) -> None:
    """Write rows with the columns of results beside them.

    Args:
        path: the file to write.
        given: a record batch, or a list of dicts.
        columns: those of a list without rows; they hold texts.
        results: the columns of results by name.
        names: what messages call each row.

    Raises:
        InputError: parquet cannot hold a value of a row, or not beside those before it.
    """
    batch = isinstance(given, pa.RecordBatch)
    try:
        if batch:
            table = pa.Table.from_batches([given])
            for name, values in results.items():
                table = table.append_column(name, values)
        elif given:  # at once: a table without columns has no rows, and takes no column that has
            keys = dict.fromkeys(chain.from_iterable(given))
            table = pa.table({key: [row.get(key) for row in given] for key in keys} | results)
        else:
            table = pa.table({name: pa.array([], pa.string()) for name in columns} | results)
        pq.write_table(table.replace_schema_metadata(), path)  # other tools' metadata would not know the new columns
    except (*_WRONG, TypeError, ValueError, OverflowError) as error:
        raise _refusal(given, names, error) from None
    if batch:
        return  # its types were in a parquet file already
    try:
        pq.read_schema(path)
    except OSError as error:
        if error.errno:  # of the disk
            raise
        raise _refusal(given, names, error) from None  # types that are nested too deeply are written, but not read


def _refusal(given: Any, names: Sequence[str], error: Exception) -> InputError:
    """The error for rows that parquet does not hold: it names the first row, and the column."""
    keys = [] if isinstance(given, pa.RecordBatch) else dict.fromkeys(chain.from_iterable(given))
    for key in keys:
        values = [row.get(key) for row in given]
        if _reason(key, values) is None:
            continue
        good, bad = 0, len(values)  # numbers of rows that can be written, and that cannot
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if _reason(key, values[:middle]) is None else (good, middle)
        alone = _reason(key, values[bad - 1 : bad])
        found = alone or f"{_reason(key, values[:bad])} beside the values before it"
        return InputError(f"{names[bad - 1]}: column {key!r} has {found}; {_JSON}")
    return InputError(f"{names[0]} and those after it: parquet cannot hold them ({first_line(error)}); {_JSON}")


def _reason(name: str, values: Sequence[Any]) -> str | None:
    """What parquet cannot hold of a column; None if it can hold all of it."""
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.table({name: values}), sink)
        pq.read_schema(pa.BufferReader(sink.getvalue()))
    except UnicodeEncodeError:
        return "half of a surrogate pair, which .parquet cannot hold"
    except (*_WRONG, TypeError, ValueError, OverflowError, OSError) as error:
        return f"a value that .parquet cannot hold ({first_line(error)})"
    return None


class Types:
    """The types of the columns of the parts so far: those that `join` will give to every row."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._parts: list[Path] = []

    def add(self, part: Path) -> None:
        """Raises InputError, beginning with the column, if its values here and in other parts have no type in common.

        Then the part does not count.
        """
        types = dict(self._types)
        for field in pq.read_schema(part):
            before = types.get(field.name, field.type)
            common = _common(before, field.type)
            if common is None:
                raise InputError(
                    f"column {field.name!r} is {_shown(field.type)}, {_shown(before)} in other rows; parquet needs one"
                )
            if common != field.type:
                _cast(pq.read_table(part), field.name, common)
            if _is_converted(before, common):
                for other in self._parts:
                    _cast(pq.read_table(other), field.name, common)
            types[field.name] = common
        self._types = types
        self._parts.append(part)


def _is_converted(before: pa.DataType, after: pa.DataType) -> bool:
    """Whether values of the first type become others in the second, which is `_common` of it and another type."""
    if before == after or pa.types.is_null(before):
        return False
    if before.num_fields != 0 and after.num_fields != 0:
        fields = {after.field(index).name: after.field(index).type for index in range(after.num_fields)}
        given = [before.field(index) for index in range(before.num_fields)]
        return any(_is_converted(field.type, fields.get(field.name, field.type)) for field in given)
    return True


def _cast(table: pa.Table, name: str, wanted: pa.DataType) -> pa.ChunkedArray:
    """A column of a part, nulls if it has none. Raises InputError, beginning with the column, for a lossy cast."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, wanted)
    values = table.column(name)
    try:
        return values.cast(wanted)
    except _WRONG as error:
        raise InputError(
            f"column {name!r} is {_shown(values.type)} in some rows and {_shown(wanted)} in others, which loses values "
            f"({first_line(error)})"
        ) from None


def _fields(schemas: Sequence[pa.Schema]) -> dict[str, pa.Field]:
    """The columns of parts by name, with types that hold the values of all. Raises InputError as `join` does."""
    fields: dict[str, pa.Field] = {}
    for field in chain.from_iterable(schemas):
        before = fields.get(field.name, field)
        common = _common(before.type, field.type)
        if common is None:
            raise InputError(
                f"column {field.name!r} mixes {_shown(before.type)} and {_shown(field.type)}, which parquet cannot "
                f"hold; {_JSON}"
            )
        fields[field.name] = before.with_type(common).with_nullable(before.nullable or field.nullable)
    everywhere = set(fields).intersection(*(schema.names for schema in schemas))
    return {name: field if name in everywhere else field.with_nullable(True) for name, field in fields.items()}


def join(parts: Sequence[Path], file: Any) -> None:
    """Write the rows of all parts, in order, to an open binary file; one part at a time is in memory.

    A part without rows adds columns, whose types count where no other part has them.

    Raises InputError if a column has types in different parts that have none in common.
    """
    schemas = [pq.read_schema(part) for part in parts]
    filled = [pq.read_metadata(part).num_rows > 0 for part in parts]
    fields = _fields(list(compress(schemas, filled)))
    for field in chain.from_iterable(schemas):
        fields.setdefault(field.name, field.with_nullable(field.nullable or any(filled)))
    names = dict.fromkeys(chain.from_iterable(each.names for each in schemas))
    schema = pa.schema([fields[name] for name in names])
    with pq.ParquetWriter(file, schema) as writer:
        for part in compress(parts, filled):
            table = pq.read_table(part)
            columns = [_cast(table, field.name, field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
