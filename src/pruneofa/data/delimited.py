"""Rows of CSV and TSV text with a header, for tasks and for the corpus."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pruneofa.errors import InputError

_LONGEST_FIELD = 2**31 - 1  # bytes; the default of the csv module is 128 KiB


def read_delimited(
    lines: Iterable[str],
    where: object,
    *,
    tabs: bool,
    literal: bool,
    check_header: Callable[[Sequence[str]], None] = lambda names: None,
) -> Iterator[dict[str, Any]]:
    """Each row by the names of the header.

    Args:
        lines: of the file, with their ends.
        where: begins messages.
        tabs: fields are separated by tabs, not by commas.
        literal: quotes are part of the text.
        check_header: called with the names, also where no row follows.

    Raises:
        InputError: naming the line that is not valid, or that has not as many fields as the header.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    quoting = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    reader = csv.DictReader(lines, delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    try:
        names = reader.fieldnames or ()
        check_header(names)
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{where}: line {reader.line_num} has not as many fields as the header ({len(names)}); "
                    "quote texts that contain the delimiter"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{where}: line {reader.line_num}: {error}; write the file again") from None
