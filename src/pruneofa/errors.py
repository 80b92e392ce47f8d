"""The two exceptions that a user's input can cause, and helpers for their messages. The CLI maps them to exit codes."""

import errno
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any


class InputError(ValueError):
    """The user's input is wrong: one line that says what, got, wanted and what to do (exit code 2)."""


class Diverged(InputError):  # noqa: N818 - it says what to do, as all these do
    """The loss or the weights of a training are NaN or infinite; `clock` is what it took, {"seconds", "tokens"}."""

    def __init__(self, message: str, clock: dict[str, Any]) -> None:
        super().__init__(message)
        self.clock = clock


class NotNow(InputError):  # noqa: N818 - it says what to do, as all these do
    """The input may be right, but something outside is not available: trying again may help (exit code 3)."""


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


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from or while handling: libraries wrap errors of others."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def gpu_failure(error: BaseException) -> str | None:
    """One line for an error of a GPU or of the connection between several, no fault of the program; else None."""
    for each in _with_causes(error):
        # By name: torch is not imported here, and only torch has such errors.
        kind, text = type(each).__name__, first_line(each)
        gpu = kind == "AcceleratorError"
        if kind == "OutOfMemoryError" or (gpu and "out of memory" in text):
            return f"the GPU is out of memory: {text}; free it, or lower the batch size or max_length"
        if kind == "DistBackendError" or (gpu and not any(words in text for words in _PROGRAM_FAULTS)):
            what = "the GPU failed" if gpu else "the connection of the GPUs failed"
            do = "check it with nvidia-smi, the same command resumes from the last checkpoint"
            return f"{what}: {text}; {do}"
    return None


# What a GPU says of a program that asks for what does not exist: the place in the program is needed.
_PROGRAM_FAULTS = ("device-side assert", "invalid ", "no kernel image", "not supported")


def short(value: Any) -> str:
    """A value as text for a message: one line of ASCII, at most 60 characters."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


# Errors of a path that the user may not write to.
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EBUSY}


def disk_is_full(error: BaseException | None) -> bool:
    """Whether this error or one of its causes says that the disk is full: libraries wrap the system's errors."""
    messages = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    return any(
        getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(m in str(each) for m in messages)
        for each in _with_causes(error)
    )


def system_error(error: BaseException | None) -> int | None:
    """The number of the system's error that caused this one, if any: libraries in Rust say it in their message only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__cause__
    return None


def torch_could_not_write(error: BaseException | None) -> bool:
    """Whether this error or one of its causes is that of torch.save for a file; it does not tell the system's error."""
    for each in _with_causes(error):
        text = str(each)
        if isinstance(each, RuntimeError) and (
            "iostream error" in text
            or "PytorchStreamWriter" in text
            or ("inline_container.cc" in text and any(words in text for words in _TORCH_WRITES))
        ):
            return True
    return False


_TORCH_WRITES = ("unexpected pos", "write failed", "open file failed")


def storage_failure(error: BaseException) -> str | None:
    """One line for an error of the disk or of permissions, which is no fault of the program; None for another."""
    name = getattr(error, "filename", None)
    if disk_is_full(error):
        where = name or " ".join(str(error).split())
        return f"disk full: {where}; free space, the same command resumes"
    if isinstance(error, OSError) and name and error.errno == errno.EIO:
        return f"{name}: the disk reports an error ({error.strerror}); check the disk, the same command resumes"
    if isinstance(error, OSError) and name and error.errno in UNWRITABLE:
        return f"{name}: {error.strerror}; check its permissions, or choose another path"
    return None


def explained(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of an error that is no fault of the program; None for one that needs its traceback."""
    if isinstance(error, InputError):
        return str(error), 3 if isinstance(error, NotNow) or disk_is_full(error) else 2
    if is_panic(error):
        return f"a library failed on this input: {first_line(error)}", 3
    if not isinstance(error, Exception):
        return None
    if isinstance(error, ImportError) and error.name is None:  # raised by pruneofa because an extra is missing
        return str(error), 3
    if failure := storage_failure(error):
        return failure, 2 if getattr(error, "errno", None) in UNWRITABLE else 3
    if failure := gpu_failure(error):
        return failure, 3
    return None


def need_train_extra() -> None:
    """Raise ImportError, with `name` None, if the packages of the train extra are not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise ImportError("training needs torch and transformers: pip install 'pruneofa[train]'")
