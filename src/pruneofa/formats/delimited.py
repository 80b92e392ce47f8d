"""Rows of CSV and TSV text with a header, for tasks, the corpus and predictions; row by row, in constant memory."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pruneofa.errors import InputError

_LONGEST_FIELD = 2**31 - 1  # bytes; the default of the csv module is 128 KiB
_LONGEST_ROW = 10_000  # lines of a row of TSV; a quote that is open for longer is part of the text
_PREFIX = 1 << 25  # characters of a TSV that decide whether its quotes are part of the text


def read_fields(lines: Iterable[str], where: object, *, tabs: bool, literal: bool = False) -> Iterator[list[str]]:
    """The names of the header, then the fields of each row; blank lines are left out.

    Columns at the end of the header that have no name, as spreadsheets write them, are left out; they must be empty.

    Args:
        lines: of the file, with their ends.
        where: begins messages.
        tabs: fields are separated by tabs, not by commas.
        literal: quotes are part of the text: see `literal_quotes`.

    Raises:
        InputError: naming the line that is not valid, that has not as many fields as the header, or that has text in
            a column left out; or there is no header, or a name twice in it.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    quoting = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    try:
        header = next(reader, None)
        width = len(header or ())
        while header and not header[-1]:
            header.pop()
        if not header:
            raise InputError(f"{where}: no header; its first line has to name the columns")
        if len(set(header)) < len(header):
            raise InputError(f"{where}: the header {', '.join(map(repr, header))} has a name twice; rename one")
        yield header
        for fields in reader:
            if fields and len(fields) != width:
                raise InputError(
                    f"{where}: line {reader.line_num} has {len(fields)} fields, the header {width}; "
                    "quote texts that contain the delimiter"
                )
            if any(fields[len(header) :]):
                raise InputError(
                    f"{where}: line {reader.line_num} has text in a column to which the header gives no name; "
                    "quote texts that contain the delimiter, or name the column"
                )
            if fields:
                yield fields[: len(header)]
    except csv.Error as error:
        raise InputError(f"{where}: line {reader.line_num}: {error}; write the file again") from None


def other_delimiter(header: Sequence[str], suffix: str) -> str | None:
    """What to say of the header of a .csv or .tsv whose one name looks like several; None if it does not."""
    wanted = {".csv": ",", ".tsv": "\t"}.get(suffix)
    if wanted is None or len(header) != 1:
        return None
    found = next((character for character in ",;\t|" if character in header[0]), None)
    return found and f"the delimiter looks like {found!r}, wanted {wanted!r} in {suffix}; write the file again"


def read_rows(lines: Iterable[str], where: object, *, tabs: bool, literal: bool = False) -> Iterator[dict[str, Any]]:
    """`read_fields` by the names of the header."""
    rows = read_fields(lines, where, tabs=tabs, literal=literal)
    header = next(rows)
    return (dict(zip(header, fields, strict=True)) for fields in rows)


def literal_quotes(lines: Iterable[str]) -> bool:
    """Whether the quotes of a TSV are part of its texts: they are if they do not enclose whole fields.

    Programs that write TSV either quote as in CSV, or write texts as they are. The second is assumed where reading the
    quotes is an error, or would join lines each of which is a row without that. The rows that begin in the first 32 Mi
    characters decide, so that no more than these are read.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    closed, plain, columns, row, width, seen = True, True, 0, 0, 0, 0

    def watched() -> Iterator[str]:
        nonlocal closed, plain, columns, row, seen
        for line in lines:
            if seen >= _PREFIX and not row:
                return
            seen += len(line)
            if text := line.rstrip("\r\n"):
                fields = text.split("\t")
                columns = columns or len(fields)
                plain = plain and len(fields) == columns
                closed = closed and all(f[:1] != '"' or (len(f) > 1 and f.endswith('"')) for f in fields)
            row += 1
            if row > _LONGEST_ROW:
                return
            yield line

    try:
        for fields in csv.reader(watched(), delimiter="\t", strict=True):
            row = 0
            width = width or len(fields)
            if fields and len(fields) != width:
                return plain  # if lines are no rows either, the reader of quotes names the line that is wrong
    except csv.Error:
        return True
    return not closed and plain and columns > 1
