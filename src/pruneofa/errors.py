"""The two exceptions that a user's input can cause, and helpers for their messages. The CLI maps them to exit codes."""

import importlib.util
from typing import Any


class InputError(ValueError):
    """The user's input is wrong: one line that says what, got, wanted and what to do (exit code 2)."""


class CheckFailed(RuntimeError):  # noqa: N818 - it is the result of a check, not a malfunction
    """A check was performed and failed (exit code 1)."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, at most 200 characters; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def short(value: Any) -> str:
    """A value as text for a message: one line of ASCII, at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def need_train_extra() -> None:
    """Raise ImportError, with `name` None, if the packages of the train extra are not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise ImportError("training needs torch and transformers: pip install 'pruneofa[train]'")
