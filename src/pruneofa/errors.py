"""The two exceptions a user can cause, which the CLI turns into exit codes, and what their messages may quote."""

import importlib.util
from typing import Any


class InputError(ValueError):
    """The user's input is wrong: one line that says what, got, wanted and what to do (exit code 2)."""


class CheckFailed(RuntimeError):  # noqa: N818 - it is a verdict, not a malfunction
    """A check was carried out and its answer is no (exit code 1)."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, at most 200 characters; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def short(value: Any) -> str:
    """A value from a file, as part of a message: one line, and no lone surrogate that a terminal could not print."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def need_train_extra() -> None:
    """Raise ImportError, without a module's name, where the packages of the train extra are not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise ImportError("training needs torch and transformers: pip install 'pruneofa[train]'")
