"""Results as Arrow columns, and parquet files by batches of rows. Needs pyarrow, of the extra predict."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pruneofa.errors import InputError, first_line

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise ImportError("parquet needs pyarrow: pip install 'pruneofa[predict]'") from None


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
    """Names of the columns, and the number of rows."""
    with _open(path) as file:
        return file.schema_arrow.names, file.metadata.num_rows


def batches(path: Path, rows: int) -> Iterator[pa.RecordBatch]:
    """The file in batches of at most `rows`, the same every time; one without rows if there are none.

    Raises InputError for a file that is not readable as parquet.
    """
    with _open(path) as file:
        try:
            if not file.metadata.num_rows:
                yield pa.RecordBatch.from_pylist([], file.schema_arrow)
            yield from (batch for batch in file.iter_batches(batch_size=rows) if len(batch))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not readable as parquet ({first_line(error)})") from None


def write_part(path: Path, given: Any, results: dict[str, pa.Array]) -> None:
    """Write rows, a record batch or a list of dicts, with the columns of results beside them.

    Raises InputError if a column of dicts mixes types.
    """
    if isinstance(given, pa.RecordBatch):
        table = pa.Table.from_batches([given])
    else:
        try:
            names = dict.fromkeys(chain.from_iterable(given))
            table = pa.table({name: [row.get(name) for row in given] for name in names})
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"a column mixes types, which parquet cannot hold ({first_line(error)})") from None
    for name, values in results.items():
        table = table.append_column(name, values)
    pq.write_table(table.replace_schema_metadata(), path)  # metadata of other tools would not know the new columns


def join(parts: Sequence[Path], file: Any) -> None:
    """Write the rows of all parts, in order, to an open binary file; one part at a time is in memory.

    Raises InputError if a column has types in different parts that have none in common.
    """
    try:
        schema = pa.unify_schemas([pq.read_schema(part) for part in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"a column mixes types, which parquet cannot hold ({first_line(error)})") from None
    with pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            table = pq.read_table(part)
            columns = [
                table.column(field.name).cast(field.type)
                if field.name in table.column_names
                else pa.nulls(table.num_rows, field.type)
                for field in schema
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
