"""The local folder of a model: the given folder, or a snapshot of a hub model."""

import errno
import functools
import os
import re
import socket
from pathlib import Path

from pruneofa.errors import InputError, NotNow, first_line
from pruneofa.formats.files import user_path
from pruneofa.progress import notice

_LIBRARIES = ("httpx", "requests", "aiohttp")  # of the hub's clients, whose errors are those of the network
# The files of a model folder that may be needed, with weights that are not pickles.
FILES = ("*.json", "*.safetensors", "*.zst", "*.txt", "*.model")


def check_inside(file: Path, folder: Path) -> None:
    """Raises InputError if `file` is a link out of its folder: a copy would hold a file that is not the model's.

    In the hub's cache the files of a snapshot are links to the blobs of the same model.
    """
    real, inside = file.resolve(), folder.resolve()
    cached = inside.parent.name == "snapshots" and real.is_relative_to(inside.parents[1] / "blobs")
    if not (real.is_relative_to(inside) or cached):
        raise InputError(f"{file}: a link to {real}, outside the folder; wanted the file itself; copy it into {folder}")


def local_folder(path: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """The folder at `path`, or a snapshot of the hub model of that id, which holds only `files` (glob patterns).

    Raises InputError when it is neither.
    """
    folder = user_path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the model's folder that contains it")
    check_model_name(str(path))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except Exception as error:  # hub, HTTP and validation errors have no common type
        raise not_on_hub(str(path), error) from None


def could_be_hub_id(name: str, root: Path = Path()) -> bool:
    """Whether a name that does not exist in the folder `root` may be looked up on the hub.

    It may not if it looks like a path: if it begins with `.`, `/` or `~`, has more than one `/`, or its first part is
    the name of an existing folder. Otherwise a typo in a path could load another model or data set.
    """
    first, slash, _ = name.partition("/")
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not (slash and (root / first).is_dir())


def check_model_name(name: str, label: str = "") -> None:
    """Raises InputError, which begins with `label`, for a name that is neither a folder nor a possible hub id."""
    if user_path(name).is_dir():
        return
    if not could_be_hub_id(name):
        raise InputError(f"{label}{name}: no such folder; give a Hugging Face folder or a hub id such as org/name")
    announce(name)


def not_on_hub(name: str, error: Exception, label: str = "") -> InputError:
    """The error for a name that is neither a local folder nor, by `error`, a model on the hub."""
    kind = kind_of_failure(error)
    if offline():
        hub = "no such model in the cache of the hub, which is not asked (--offline or HF_HUB_OFFLINE)"
    elif kind is NotNow:
        hub = f"the hub could not be asked ({first_line(error)})"
    else:
        hub = f"the hub has no such model ({first_line(error)})"
    do = "check the path, or try again" if kind is NotNow else "check the path"
    return kind(f"{label}{name}: no such folder in {Path.cwd()}, and {hub}; {do}")


def kind_of_failure(error: BaseException) -> type[InputError]:
    """NotNow if the hub could not be asked, by an error of its libraries; InputError if it said no, or is not asked."""
    return InputError if offline() or _answered(error) else NotNow


def _answered(error: BaseException | None) -> bool:
    """Whether the hub said no, by an error or what it came from: no server was without an answer, busy or broken."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return status < 429 and status != 408
        library = type(error).__module__  # the hub's has changed, and with it the types of errors
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or library.startswith(_LIBRARIES):
            return False
        if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN):
            return False
        error = error.__cause__ or error.__context__
    return True


def offline() -> bool:
    """Whether the libraries of the hub are told to use their cache only, as `--offline` does."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@functools.cache
def announce(name: str) -> None:
    """Say on stderr, once per name, that the hub is asked for it."""
    if not offline():
        notice(f"{name}: not on this machine by that name; the Hugging Face hub is asked")
