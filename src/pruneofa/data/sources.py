"""Text sources: articles from local files or the hub, one at a time, in bounded memory.

File formats:
  .parquet          one article per row, in a column
  .jsonl            one article per line, in a key (also .jsonl.gz, .jsonl.zst)
  .csv, .tsv        one article per row, in a column of the header, such as the rows of a task (also .gz, .zst); the
                    first 32 Mi characters of a TSV decide whether its quotes are part of the text
  .txt              articles separated by blank lines; a file whose first MiB has no blank line between
                    two lines of text has one article per line (also .txt.gz, .txt.zst)
A folder is read recursively, its files in the order of their names. Anything else is a hub data set.
"""

import codecs
import contextlib
import difflib
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pruneofa.data.characters import half_pair, nul
from pruneofa.data.root import root_folder
from pruneofa.errors import InputError
from pruneofa.formats.delimited import literal_quotes, read_fields
from pruneofa.formats.files import file_fingerprint
from pruneofa.formats.hub import announce, could_be_hub_id
from pruneofa.formats.json_lines import parse_line

KINDS = (".parquet", ".jsonl", ".txt", ".csv", ".tsv")
COMPRESSED = (".gz", ".zst")
WANTED = ".parquet, .jsonl, .txt, .csv or .tsv (all but the first also .gz or .zst)"
PEEK = 1 << 20  # bytes read to tell how a .txt file separates its articles, and per block when hashing
ROWS = 64  # rows decoded at once
LONGEST = 10_000_000  # characters of an article, of which tokenizing takes a hundred bytes each

Article = tuple[str, int]  # text, and the units of progress (bytes, or rows of a hub data set) since the last one


@dataclass(frozen=True)
class Files:
    """Local files in reading order. `size` is in bytes."""

    paths: tuple[Path, ...]

    @property
    def plain(self) -> bool:
        """Whether no file has columns."""
        return all(_kind(path) == ".txt" for path in self.paths)

    @property
    def size(self) -> int:
        """Bytes on disk: the total of the progress that `articles` reports."""
        return sum(path.stat().st_size for path in self.paths)

    def articles(self, column: str) -> Iterator[Article]:
        """Yield every article that is not blank. Raises InputError naming the file that is wrong or empty."""
        for path in self.paths:
            found = False
            for text, consumed in _read(path, column):
                _refuse_long(path, text)
                found = found or bool(text)
                yield text, consumed
            if not found:
                raise InputError(f"{path}: no text in this file; remove it from the source or write it again")

    def fingerprint(self, column: str) -> list[str]:
        """One sha256 per file, of its text before compression or of its parquet bytes, independent of its name.

        That of a TSV with quotes also says whether they are part of the text.

        Raises InputError for errors that are found without reading articles: not UTF-8, empty, no such column.
        """
        return [_check(path, column) for path in self.paths]


@dataclass(frozen=True)
class Hub:
    """The train split of a hub data set, read by `datasets`, which takes a local folder as well."""

    name: str
    config: str | None
    streaming: bool = False

    @property
    def size(self) -> int:
        """Rows, 0 if the data set does not say: the total of the progress that `articles` reports."""
        splits = self._builder().info.splits or {}
        return splits["train"].num_examples if "train" in splits else 0

    def articles(self, column: str) -> Iterator[Article]:
        """Yield every article that is not blank. Raises InputError if there is none, or no such column."""
        import datasets

        with self._explained():
            data = datasets.load_dataset(self.name, self.config, split="train", streaming=self.streaming)
        _need_column(self.name, column, data.column_names or next(iter(data), {}))
        found = False
        for batch in data.select_columns([column]).iter(ROWS):
            for value in batch[column]:
                text = _text(self.name, column, value)
                _refuse_long(self.name, text)
                found = found or bool(text)
                yield text, 1
        if not found:
            raise InputError(f"{self.name}: no text in column {column!r}; choose another with corpus.column")

    def fingerprint(self, column: str) -> list[str]:
        """Name, configuration and revision; nothing is downloaded but the description of the data set."""
        builder = self._builder()
        if builder.info.features:
            _need_column(self.name, column, builder.info.features)
        return [self.name, builder.config_id, str(builder.hash)]

    def _builder(self) -> Any:
        import datasets

        with self._explained():
            return datasets.load_dataset_builder(self.name, self.config)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"corpus source {self.name!r}: no such local file or folder, and it cannot be read as a hub data "
                f"set ({reason}); check corpus.source, corpus.config, data_root and the network"
            ) from None


def find(
    source: str | list[str], config: str | None, data_root: str | Path | None, *, streaming: bool
) -> list[Files | Hub]:
    """Find the sources that the recipe names.

    Raises InputError for a path that does not exist and cannot be a hub id, and for a folder without text files.
    """
    return [_find(name, config, data_root, streaming) for name in ([source] if isinstance(source, str) else source)]


def _find(name: str, config: str | None, data_root: str | Path | None, streaming: bool) -> Files | Hub:
    root = root_folder(data_root)
    path = root / Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _kind(p) and p.is_file() and p.name[0] != ".")
        if not found:
            raise InputError(f"{path}: this folder has no {WANTED} file; check corpus.source (and data_root)")
        return Files(tuple(found))
    if path.is_file():
        if not _kind(path):
            raise InputError(f"{path}: unsupported kind of file; wanted {WANTED}")
        return Files((path,))
    if not could_be_hub_id(name, root) or Path(name).suffix in (*KINDS, *COMPRESSED, ".json"):
        raise InputError(f"{path}: no such file or folder; check corpus.source (and data_root)")
    announce(name)
    return Hub(name, config, streaming)


def _kind(path: Path) -> str:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    kind = suffix.lower()
    return kind if kind in KINDS and not (kind == ".parquet" and path.suffix in COMPRESSED) else ""


def _read(path: Path, column: str) -> Iterator[Article]:
    if _kind(path) == ".parquet":
        yield from _read_parquet(path, column)
        return
    with open(path, "rb") as raw, _decompressed(path, raw) as file:
        lines = _lines(path, file)
        if _kind(path) == ".txt":
            texts = _documents(lines, _blank_separated(path))
        else:
            texts = (_values if _kind(path) == ".jsonl" else _fields)(path, lines, column)
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
                yield _text(path, column, text), size // rows


@contextlib.contextmanager
def _parquet(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=PEEK, pre_buffer=False) as file:
            _need_column(path, column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: column {column!r} is {kind}, wanted strings; set corpus.column")
            if not file.metadata.num_rows:
                raise InputError(f"{path}: this file has no rows; remove it from the source or write it again")
            yield file
            pa.default_memory_pool().release_unused()
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a readable parquet file ({reason}); write it again") from None


def _text(where: object, column: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds {type(value).__name__}, wanted strings; set corpus.column")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise half_pair(where, column) from None
    return value.strip()


def _refuse_long(where: object, text: str) -> None:
    if len(text) > LONGEST:
        raise InputError(
            f"{where}: an article of {len(text):,} characters, wanted at most {LONGEST:,}; divide it (in a .txt file "
            "blank lines separate articles)"
        )


def _need_column(where: object, column: str, columns: Iterable[str]) -> None:
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
            _need_column(f"{path} line {number}", column, row)
        yield _text(f"{path} line {number}", column, row[column])


def _fields(path: Path, lines: Iterable[str], column: str) -> Iterator[str]:
    tabs = _kind(path) == ".tsv"
    rows = read_fields(lines, path, tabs=tabs, literal=tabs and _literal_quotes(path))
    header = next(rows)
    _need_column(path, column, header)
    index = header.index(column)
    return (_text(path, column, row[index]) for row in rows)


def _literal_quotes(path: Path) -> bool:
    with open(path, "rb") as raw, _decompressed(path, raw) as file:
        return literal_quotes(_lines(path, file))


def _check(path: Path, column: str) -> str:
    if _kind(path) == ".parquet":
        with _parquet(path, column):
            return file_fingerprint(path)
    digest, offset, decoder = hashlib.sha256(), 0, codecs.getincrementaldecoder("utf-8")()
    quotes = False
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
            quotes = quotes or b'"' in block
    if not offset:
        raise InputError(f"{path}: this file is empty; remove it from the source or write it again")
    if _kind(path) != ".txt":
        next(iter(_read(path, column)), None)  # the column must be there before the long work starts
    if quotes and _kind(path) == ".tsv" and not _literal_quotes(path):
        digest.update(b"\0quotes enclose fields")  # earlier versions took them for text: other tokens of the same file
    return digest.hexdigest()
