"""Articles of local files, one at a time, in bounded memory.

File formats:
  .parquet          one article per row, in a column
  .jsonl            one article per line, in a key (also .jsonl.gz, .jsonl.zst)
  .csv, .tsv        one article per row, in a column of the header, such as the rows of a task (also .gz, .zst); the
                    first 32 Mi characters of a TSV decide whether its quotes are part of the text
  .txt              articles separated by blank lines; a file whose first MiB has no blank line between
                    two lines of text has one article per line (also .txt.gz, .txt.zst)
"""

import codecs
import contextlib
import difflib
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pruneofa.data.characters import half_pair, nul
from pruneofa.errors import InputError, first_line
from pruneofa.formats.delimited import literal_quotes, other_delimiter, read_fields
from pruneofa.formats.files import file_fingerprint
from pruneofa.formats.json_lines import parse_line

KINDS = (".parquet", ".jsonl", ".txt", ".csv", ".tsv")
COMPRESSED = (".gz", ".zst")
PEEK = 1 << 20  # bytes read to tell how a .txt file separates its articles, and per block when hashing
ROWS = 64  # rows decoded at once
LONGEST = 10_000_000  # characters of an article, of which tokenizing takes a hundred bytes each

Article = tuple[str, int]  # text, and the units of progress (bytes, or rows of a hub data set) since the last one


def kind_of(path: Path) -> str:
    """The kind of a file by its name, one of KINDS; "" for one that cannot be read."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    kind = suffix.lower()
    return kind if kind in KINDS and not (kind == ".parquet" and path.suffix in COMPRESSED) else ""


def read_articles(path: Path, column: str) -> Iterator[Article]:
    """Yield every article of a file, blank ones too; `column` is not used for .txt.

    Raises InputError naming the file, and the line or byte, that is wrong.
    """
    if kind_of(path) == ".parquet":
        yield from _read_parquet(path, column)
        return
    with open(path, "rb") as raw, _decompressed(path, raw) as file:
        lines = _lines(path, file)
        if kind_of(path) == ".txt":
            texts = _documents(lines, _blank_separated(path))
        else:
            texts = (_values if kind_of(path) == ".jsonl" else _fields)(path, lines, column)
        position = 0
        for text in texts:
            consumed = raw.tell() - position
            position += consumed
            yield text, consumed


def _read_parquet(path: Path, column: str) -> Iterator[Article]:
    with _parquet(path, column) as file:
        size, rows = path.stat().st_size, file.metadata.num_rows
        # Without threads and read-ahead, memory is limited to a page or two of the column.
        for batch in file.iter_batches(ROWS, columns=[column], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield checked_text(path, column, text), size // rows


@contextlib.contextmanager
def _parquet(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pruneofa.data.rows import is_text

    try:
        with pq.ParquetFile(path, buffer_size=PEEK, pre_buffer=False) as file:
            need_column(path, column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            if not is_text(kind):
                raise InputError(f"{path}: column {column!r} is {kind}, wanted strings; set corpus.column")
            if not file.metadata.num_rows:
                raise InputError(f"{path}: this file has no rows; remove it from the source or write it again")
            yield file
            pa.default_memory_pool().release_unused()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)}); write it again") from None


def checked_text(where: object, column: str, value: object) -> str:
    """A value of a column as text without white space around it; None is blank.

    Raises InputError, beginning with `where`, for what is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds {type(value).__name__}, wanted strings; set corpus.column")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise half_pair(where, column) from None
    return value.strip()


def refuse_long(where: object, text: str) -> None:
    """Raises InputError, beginning with `where`, for an article of more than LONGEST characters."""
    if len(text) > LONGEST:
        raise InputError(
            f"{where}: an article of {len(text):,} characters, wanted at most {LONGEST:,}; divide it (in a .txt file "
            "blank lines separate articles)"
        )


def need_column(where: object, column: str, columns: Iterable[str]) -> None:
    """Raises InputError, beginning with `where`, unless `column` is one of `columns`."""
    columns = list(columns)
    if column in columns:
        return
    near = difflib.get_close_matches(column, columns, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"{where}: no column {column!r}, it has {', '.join(columns)}; {hint}set corpus.column")


@contextlib.contextmanager
def _decompressed(path: Path, raw: BinaryIO) -> Iterator[Any]:
    """A buffered reader of the text bytes of `raw`."""
    from pruneofa.formats.zstd import ZstdError, ZstdFile

    try:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            yield ZstdFile(raw)
        else:
            yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error, ZstdError) as error:
        raise InputError(f"{path}: damaged or not {path.suffix[1:]} data ({error}); compress it again") from None


def _lines(path: Path, file: Any) -> Iterator[str]:
    offset = 0
    for line in file:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, line[error.start]) from None
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(line)


def _not_utf8(path: Path, byte: int, value: int) -> InputError:
    return InputError(f"{path}: not UTF-8 at byte {byte} (0x{value:02x}); convert it, for example with iconv -t utf-8")


def _blank_separated(path: Path) -> bool:
    with open(path, "rb") as raw, _decompressed(path, raw) as file:
        return re.search(rb"\n[ \t\r\f]*\n", file.read(PEEK).strip()) is not None


def _documents(lines: Iterable[str], blank_separated: bool) -> Iterator[str]:
    part: list[str] = []
    for line in lines:
        blank = not line.strip()
        if not blank:
            part.append(line)
        if part and (blank or not blank_separated):
            yield "".join(part).strip()
            part = []
    if part:
        yield "".join(part).strip()


def _values(path: Path, lines: Iterable[str], column: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_line(line, f"{path}: line {number}")
        if column not in row:
            need_column(f"{path} line {number}", column, row)
        yield checked_text(f"{path} line {number}", column, row[column])


def _fields(path: Path, lines: Iterable[str], column: str) -> Iterator[str]:
    tabs = kind_of(path) == ".tsv"
    rows = read_fields(lines, path, tabs=tabs, literal=tabs and _literal_quotes(path))
    header = next(rows)
    if column not in header and (wrong := other_delimiter(header, kind_of(path))):
        raise InputError(f"{path}: no column {column!r}: {wrong}")
    need_column(path, column, header)
    index = header.index(column)
    return (checked_text(path, column, row[index]) for row in rows)


def _literal_quotes(path: Path) -> bool:
    with open(path, "rb") as raw, _decompressed(path, raw) as file:
        return literal_quotes(_lines(path, file))


def file_digest(path: Path, column: str) -> str:
    """sha256 of the text of a file before compression, or of the bytes of a parquet file; see `Files.fingerprint`.

    Raises InputError for what is found without reading articles: not UTF-8, NUL, empty, no such column.
    """
    if kind_of(path) == ".parquet":
        with _parquet(path, column):
            return file_fingerprint(path)
    digest, offset, decoder = hashlib.sha256(), 0, codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as raw, _decompressed(path, raw) as file:
        while True:
            block = file.read(PEEK)
            start = offset - len(decoder.getstate()[0])  # a character may straddle two blocks
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, start + error.start, error.object[error.start]) from None
            if not block:
                break
            if (zero := block.find(0)) >= 0:
                raise nul(path, f"at byte {offset + zero}")
            digest.update(block)
            offset += len(block)
    if not offset:
        raise InputError(f"{path}: this file is empty; remove it from the source or write it again")
    if kind_of(path) != ".txt":
        next(iter(read_articles(path, column)), None)  # the column must be there before the long work starts
    return digest.hexdigest()
