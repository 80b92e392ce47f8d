"""JSON lines: one object per line, for tasks, the corpus and predictions."""

import json
from typing import Any

from pruneofa.errors import InputError, first_line


def parse_line(line: str, name: object) -> dict[str, Any]:
    """One line of JSON. Raises InputError, beginning with `name`, unless it is an object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits, and deep nesting
        raise InputError(f"{name} is not JSON ({first_line(error)}); write one object per line") from None
    if not isinstance(row, dict):
        raise InputError(f"{name} is a JSON {type(row).__name__}, wanted an object; write one object per line")
    return row
