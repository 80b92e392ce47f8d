"""Text sources: local files, folders of them and hub data sets.

A folder is read recursively, its files in the order of their names. What is no local path is a hub data set. How files
are read is in `articles`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneofa.data.articles import (
    COMPRESSED,
    KINDS,
    ROWS,
    Article,
    checked_text,
    file_digest,
    kind_of,
    need_column,
    read_articles,
    refuse_long,
)
from pruneofa.data.root import root_folder
from pruneofa.errors import InputError
from pruneofa.formats.files import user_path
from pruneofa.formats.hub import announce, could_be_hub_id, kind_of_failure

WANTED = ".parquet, .jsonl, .txt, .csv or .tsv (all but the first also .gz or .zst)"


@dataclass(frozen=True)
class Files:
    """Local files in reading order. `size` is in bytes."""

    paths: tuple[Path, ...]

    @property
    def plain(self) -> bool:
        """Whether no file has columns."""
        return all(kind_of(path) == ".txt" for path in self.paths)

    @property
    def size(self) -> int:
        """Bytes on disk: the total of the progress that `articles` reports."""
        return sum(path.stat().st_size for path in self.paths)

    def articles(self, column: str) -> Iterator[Article]:
        """Yield every article, blank ones too. Raises InputError naming the file that is wrong or has no text."""
        for path in self.paths:
            found = False
            for text, consumed in read_articles(path, column):
                refuse_long(path, text)
                found = found or bool(text)
                yield text, consumed
            if not found:
                raise InputError(f"{path}: no text in this file; remove it from the source or write it again")

    def fingerprint(self, column: str) -> list[str]:
        """One sha256 per file, of its text before compression or of its parquet bytes, independent of its name.

        That of a TSV with quotes also says whether they are part of the text.

        Raises InputError for errors that are found without reading articles: not UTF-8, empty, no such column.
        """
        return [file_digest(path, column) for path in self.paths]


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
        """Yield every article, blank ones too. Raises InputError if all are blank, or there is no such column."""
        import datasets

        with self._explained():
            data: Any = datasets.load_dataset(self.name, self.config, split="train", streaming=self.streaming)
        need_column(self.name, column, data.column_names or next(iter(data), {}))
        found = False
        for batch in data.select_columns([column]).iter(ROWS):
            for value in batch[column]:
                text = checked_text(self.name, column, value)
                refuse_long(self.name, text)
                found = found or bool(text)
                yield text, 1
        if not found:
            raise InputError(f"{self.name}: no text in column {column!r}; choose another with corpus.column")

    def fingerprint(self, column: str) -> list[str]:
        """Name, configuration and revision; nothing is downloaded but the description of the data set."""
        builder = self._builder()
        if builder.info.features:
            need_column(self.name, column, builder.info.features)
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
            raise kind_of_failure(error)(
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


def unread(source: str | list[str], data_root: str | Path | None) -> dict[str, str]:
    """The settings of a corpus that its sources do not read, with the reason. Raises InputError as `find` does."""
    readers = find(source, None, data_root, streaming=False)
    if any(isinstance(reader, Hub) for reader in readers):
        return {}
    found = {"config": "only hub data sets have one, not local files"}
    plain = all(isinstance(reader, Files) and reader.plain for reader in readers)
    return found | ({"column": ".txt files have no columns"} if plain else {})


def _find(name: str, config: str | None, data_root: str | Path | None, streaming: bool) -> Files | Hub:
    root = root_folder(data_root)
    path = root / user_path(name)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if kind_of(p) and p.is_file() and p.name[0] != ".")
        if not found:
            raise InputError(f"{path}: this folder has no {WANTED} file; check corpus.source (and data_root)")
        return Files(tuple(found))
    if path.is_file():
        if not kind_of(path):
            raise InputError(f"{path}: unsupported kind of file; wanted {WANTED}")
        return Files((path,))
    if not could_be_hub_id(name, root) or Path(name).suffix in (*KINDS, *COMPRESSED, ".json"):
        raise InputError(f"{path}: no such file or folder; check corpus.source (and data_root)")
    announce(name)
    return Hub(name, config, streaming)
