"""The two exceptions that a user's input can cause, and helpers for their messages. The CLI maps them to exit codes."""

import importlib.util
from typing import Any


class InputError(ValueError):
    """The user's input is wrong: one line that says what, got, wanted and what to do (exit code 2)."""


class CheckFailed(RuntimeError):  # noqa: N818 - it is the result of a check, not a malfunction
    """A check was performed and failed (exit code 1)."""


def printable(text: str) -> str:
    """`text` with everything but printable characters escaped: control characters, escape sequences, line ends.

    What is written to a terminal passes through here, because names in a file can hold any character.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, printable, at most 200 characters; its type if it has none."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:200])


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust failed at an assertion of its own: such an error is not an Exception."""
    return type(error).__name__ == "PanicException"


def short(value: Any) -> str:
    """A value as text for a message: one line of ASCII, at most 60 characters."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def need_train_extra() -> None:
    """Raise ImportError, with `name` None, if the packages of the train extra are not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise ImportError("training needs torch and transformers: pip install 'pruneofa[train]'")
