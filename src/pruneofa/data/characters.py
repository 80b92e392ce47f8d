"""Errors of the characters that no text has: NUL, and half of a surrogate pair, which only an escape of JSON writes.

`where` begins the messages.
"""

from pruneofa.errors import InputError


def nul(where: object, place: str) -> InputError:
    """The error of a file with a NUL at `place`, such as "in line 3"."""
    return InputError(f"{where}: NUL {place}, which no text has; convert the file, or write it again")


def half_pair(where: object, column: str) -> InputError:
    """The error of a column with half of a surrogate pair."""
    found = f"column {column!r} has half of a surrogate pair, which is no text"
    return InputError(f"{where}: {found}; write the file again")
