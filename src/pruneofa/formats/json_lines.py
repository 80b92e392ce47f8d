"""JSON lines: one object per line, for tasks, the corpus and predictions."""

import json
from typing import Any

from pruneofa.errors import InputError, first_line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_line(line: str, name: object) -> dict[str, Any]:
    """One line of JSON. Raises InputError, beginning with `name`, unless it is an object without a key twice."""
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits, and deep nesting
        raise InputError(f"{name} is not JSON ({first_line(error)}); write one object per line") from None
    if not isinstance(row, dict):
        raise InputError(f"{name} is a JSON {type(row).__name__}, wanted an object; write one object per line")
    return row
