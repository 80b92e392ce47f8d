"""Task data as tables: local CSV, TSV, JSONL and parquet files, folders of splits, and hub data sets."""

import difflib
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruneofa.data.characters import half_pair, nul
from pruneofa.data.labels import as_text, refuse_row_ids
from pruneofa.data.root import root_folder
from pruneofa.errors import InputError, first_line
from pruneofa.formats.delimited import literal_quotes, other_delimiter, read_fields, read_rows
from pruneofa.formats.files import user_path
from pruneofa.formats.hub import announce, could_be_hub_id, kind_of_failure
from pruneofa.formats.json_lines import parse_line

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
HELD_OUT = 10  # one row in so many is held out where the data has no validation rows


def load_splits(
    data: str | Sequence[str],
    *,
    where: str,
    evaluations: Mapping[str, Sequence[str]],
    config: str | None = None,
    validation: str | None = None,
    strict: bool = False,
    whole: bool = False,
    data_root: str | Path | None = None,
) -> dict[str, pa.Table]:
    """Read the training rows, as `"train"`, and the evaluation rows, under the keys of `evaluations`.

    Args:
        data: file(s), a folder with one file per split (`train.parquet`, `train-00000-of-00001.parquet`, ...)
            or a hub id; relative paths are looked up in `data_root`.
        where: beginning of error messages, such as `tasks.sst2`.
        evaluations: split names to look for, first match wins, by the key they are returned under.
        config: configuration of a hub data set.
        validation: file with the evaluation rows, instead of those of `data`.
        strict: a folder or hub data set without an evaluation split is an error; otherwise the result may have no
            `""`, and the caller holds out rows (`hold_out`).
        whole: read only evaluation rows: all rows of files, or the evaluation splits of a folder or hub data set, which
            must exist; training rows are not needed.

    Raises:
        InputError: the data are missing, lack a split, are not UTF-8, cannot be parsed, or are empty.
    """
    root = root_folder(data_root)
    names = [data] if isinstance(data, str) else list(data)
    paths = [root / user_path(name) for name in names]
    if validation:  # evaluation splits of data are then not read
        evaluations = {}
    required = (set() if whole else {"train"}) | (set(evaluations) if strict or whole else set())
    wanted = {"train": ("train",), **evaluations}
    if len(paths) == 1 and paths[0].is_dir():
        found = _folder(paths[0], where, wanted, required)
    elif len(paths) > 1 or paths[0].is_file() or not _could_be_hub_id(names[0], root):
        found = {"train": _concatenate([read(path, where) for path in paths], where)}
    else:
        found = _hub(names[0], config, root, where, wanted, required)
    if validation:
        found[""] = read(root / user_path(validation), where)
    elif "" not in found and whole:  # then data was files
        found[""] = found.pop("train")
    return found


def read(path: Path, where: str) -> pa.Table:
    """Read one file by its suffix; CSV and TSV columns are all strings.

    Raises InputError for a file that is missing, of another kind, damaged or without rows; `where` begins the message.
    """
    if not path.is_file():
        raise InputError(f"{where}: {path}: no such file; check {where}.data, {where}.validation and data_root")
    if (kind := path.suffix.lower()) not in SUFFIXES:
        raise InputError(f"{where}: {path}: got {path.suffix or 'no suffix'!r}, wanted {', '.join(SUFFIXES)}")
    if kind == ".parquet":
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{where}: {path}: not readable as parquet ({first_line(error)})") from None
    else:
        text = _decode(path, where)
        rows = _json_lines(text, path, where) if kind == ".jsonl" else _delimited(text, path, where)
        keys = dict.fromkeys(chain.from_iterable(rows))  # of all rows: the first may lack some
        table = pa.table({key: _array([row.get(key) for row in rows], f"{where}: {path}", key) for key in keys})
    if table.num_rows == 0:
        raise InputError(f"{where}: {path}: the file has no rows")
    return table


def _array(values: list[Any], where: str, key: str) -> pa.Array:
    """A column of JSON values. Raises InputError for what a table cannot hold."""
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        raise half_pair(where, key) from None
    except OverflowError:
        raise InputError(f"{where}: column {key!r} has an integer of over 64 bits; write it as a string") from None
    except (pa.ArrowException, TypeError) as error:
        raise InputError(f"{where}: {key!r} mixes types ({first_line(error)}); write one type in a column") from None


def column(table: pa.Table, name: str, role: str, where: str) -> pa.ChunkedArray:
    """The column `name`. Raises InputError with the columns found and the nearest of them."""
    if name in table.column_names:
        try:
            table.column(name).validate(full=True)  # also that strings are UTF-8
        except pa.ArrowInvalid as error:
            raise InputError(f"{where}: column {name!r} cannot be read ({first_line(error)}); write it again") from None
        return table.column(name)
    near = difflib.get_close_matches(name, table.column_names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; set {where}.{role}"
    found = ", ".join(map(repr, table.column_names))
    raise InputError(f"{where}: no {role} column {name!r} among {found}{hint}")


def class_labels(table: pa.Table) -> dict[str, list[str]]:
    """The names by class id of every column of class ids, as `datasets` describes it in the metadata of a table."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        described = {name: feature for name, feature in features.items() if isinstance(feature, dict)}  # others: lists
    except (ValueError, KeyError, TypeError, AttributeError):  # there are none, or another program wrote them
        return {}
    found = {name: feature.get("names") for name, feature in described.items() if feature.get("_type") == "ClassLabel"}
    integers = {field.name for field in table.schema if pa.types.is_integer(field.type)}
    return {name: list(map(str, names)) for name, names in found.items() if names and name in integers}


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, as a dictionary of them does too."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def text_column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """The column `name`. Raises InputError unless it holds a string in every row, not all of them blank."""
    values = column(table, name, "text", where)
    if not is_text(values.type):
        raise InputError(f"{where}: text column {name!r} holds {values.type}, wanted strings")
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    if values.null_count:
        first = int(np.flatnonzero(values.is_null().to_numpy())[0]) + 1
        raise InputError(
            f"{where}: text column {name!r} is empty in {values.null_count} rows, first in row {first}; "
            "remove them or write an empty string"
        )
    if not any(text.as_py().strip() for text in values):
        raise InputError(
            f"{where}: text column {name!r} is blank in all {len(values)} rows; set {where}.text to another"
        )
    return values


def hold_out(
    table: pa.Table, key: Sequence[str], label: str | None, where: str, part: int = 0
) -> tuple[pa.Table, pa.Table]:
    """Split into training and held-out rows by a hash of the `key` columns; `part` says which tenth is held out.

    The same text always falls on the same side, independent of the order of the rows and of rows added later, so
    that duplicates cannot leak. Rows of a label that would be held out completely stay in training. Part 0 is for the
    evaluation of data without evaluation rows, part 1 for that of `check_epochs`.

    Raises InputError if no rows are held out, or all; in part 0 also for a label column of row ids.
    """
    keys = zip(*(text_column(table, name, where).to_pylist() for name in key), strict=True)
    digests = (hashlib.sha256("\x1f".join(texts).encode("utf-8", "surrogatepass")).digest() for texts in keys)
    out = np.fromiter((int.from_bytes(digest[:8], "big") % HELD_OUT == part for digest in digests), bool)
    if label is not None:
        labels = np.array([as_text(value) for value in column(table, label, "label", where).to_pylist()])
        if part == 0:
            refuse_row_ids(labels.tolist(), label, where)
        out &= np.isin(labels, np.unique(labels[~out]))
    if not out.any() or out.all():
        raise InputError(
            f"{where}: {table.num_rows} rows are too few to hold out one in {HELD_OUT}; "
            + (
                f"give a file with evaluation rows in {where}.validation"
                if part == 0
                else f"set {where}.check_epochs=false"
            )
        )
    return table.filter(pa.array(~out)), table.filter(pa.array(out))


def _folder(folder: Path, where: str, wanted: Mapping[str, Sequence[str]], required: set[str]) -> dict[str, pa.Table]:
    def split(names: Sequence[str]) -> pa.Table | None:
        for name in names:
            paths = sorted(
                path
                for path in folder.iterdir()
                if path.suffix.lower() in SUFFIXES and re.fullmatch(rf"{name}(-\d+-of-\d+)?", path.stem)
            )
            if paths:
                _check_complete(paths, where)
                return _concatenate([read(path, where) for path in paths], where)
        return None

    found = {key: table for key, names in wanted.items() if (table := split(names)) is not None}
    for key, names in wanted.items():
        if key not in found and key in required:
            here = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise InputError(f"{where}: {folder}: no split {names[0]!r} (wanted {names[0]}.parquet), found {here}")
    return found


def _check_complete(paths: Sequence[Path], where: str) -> None:
    """Raise InputError unless the files of a split are one, or all shards of one: others repeat rows or lack some."""
    shards = [re.fullmatch(r".*-(\d+)-of-(\d+)", path.stem) for path in paths]
    indices = sorted(int(shard[1]) for shard in shards if shard)
    of = {(int(shard[2]), path.suffix.lower()) for shard, path in zip(shards, paths, strict=True) if shard}
    every = [list(range(first, first + len(paths))) for first in (0, 1)]
    if shards != [None] and not (indices in every and of == {(len(paths), paths[0].suffix.lower())}):
        names = ", ".join(path.name for path in paths[:4]) + (", ..." if len(paths) > 4 else "")
        raise InputError(
            f"{where}: {paths[0].parent}: got {names}, wanted one file of the split, or as many shards as their names "
            "say; download the missing ones, or remove the others"
        )


def _hub(
    name: str,
    config: str | None,
    root: Path,
    where: str,
    wanted: Mapping[str, Sequence[str]],
    required: set[str],
) -> dict[str, pa.Table]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    found = {}
    announce(name)
    try:
        available = datasets.get_dataset_split_names(name, config)
        for key, names in wanted.items():
            present = [split for split in names if split in available]
            if present:
                found[key] = datasets.load_dataset(name, config, split=present[0]).with_format("arrow")[:]
            elif key in required:
                raise InputError(f"{where}: hub data set {name}: no split {names[0]!r} among {available}")
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise kind_of_failure(error)(
            f"{where}: {name!r} is neither a file or folder in {root} nor a readable hub data set "
            f"({type(error).__name__}: {first_line(error)}); set {where}.data or data_root"
        ) from None
    return found


def _could_be_hub_id(name: str, root: Path) -> bool:
    return Path(name).suffix.lower() not in SUFFIXES and could_be_hub_id(name, root)


def _concatenate(tables: list[pa.Table], where: str) -> pa.Table:
    described = [(names, table) for table in tables if (names := class_labels(table))]
    if any(names != described[0][0] for names, _ in described):
        raise InputError(f"{where}: the files have different names for their class ids; write them with the same ones")
    try:
        table = pa.concat_tables(tables, promote_options="default")
        return table.replace_schema_metadata(described[0][1].schema.metadata) if described else table
    except pa.ArrowException as error:
        raise InputError(f"{where}: the files have different columns ({first_line(error)})") from None


def _decode(path: Path, where: str) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}: {path}: not UTF-8 at line {line}; convert it, for example with iconv") from None
    if (zero := text.find("\0")) >= 0:
        line = text.count("\n", 0, zero) + 1
        raise nul(f"{where}: {path}", f"in line {line}")
    return text


def _json_lines(text: str, path: Path, where: str) -> list[dict[str, Any]]:
    lines = enumerate(text.split("\n"), 1)
    return [parse_line(line, f"{where}: {path}: line {number}") for number, line in lines if line.strip()]


def _delimited(text: str, path: Path, where: str) -> list[dict[str, Any]]:
    def lines() -> io.StringIO:
        return io.StringIO(text, newline="")

    tabs = path.suffix.lower() == ".tsv"
    how = {"where": f"{where}: {path}", "tabs": tabs, "literal": tabs and literal_quotes(lines())}
    if wrong := other_delimiter(next(read_fields(lines(), **how)), path.suffix.lower()):
        raise InputError(f"{where}: {path}: {wrong}")
    return list(read_rows(lines(), **how))
