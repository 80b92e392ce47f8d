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
_DECISIVE = ("modules.json", "config_sentence_transformers.json", "quantization.json")  # without them: another model
_PARTLY = "the hub's cache holds only a part of it, or does not say that it is all; load it once online"


def check_inside(file: Path, folder: Path) -> None:
    """Raises InputError if `file` is a link out of its folder: a copy would hold a file that is not the model's.

    So it does for what is no regular file, such as a link to nothing.
    In the hub's cache the files of a snapshot are links to the blobs of the same model.
    """
    real, inside = file.resolve(), folder.resolve()
    cached = inside.parent.name == "snapshots" and real.is_relative_to(inside.parents[1] / "blobs")
    if not (real.is_relative_to(inside) or cached):
        raise InputError(f"{file}: a link to {real}, outside the folder; wanted the file itself; copy it into {folder}")
    if not real.is_file():
        raise InputError(f"{file}: not a regular file; copy the file again")


def local_folder(path: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """The folder at `path`, or a snapshot of the hub model of that id, which holds only `files` (glob patterns).

    Raises InputError when it is neither, and for a snapshot in the cache that may lack files which the model has.
    """
    folder = user_path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the model's folder that contains it")
    check_model_name(str(path))
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(path), allow_patterns=list(files)))
    except Exception as error:  # hub, HTTP and validation errors have no common type
        if type(error).__name__ == "IncompleteSnapshotError":
            raise kind_of_failure(error)(f"{path}: {_PARTLY}") from None
        raise not_on_hub(str(path), error) from None
    if folder.parent.name == "snapshots" and not _all_is_known(str(path), folder):
        raise (InputError if offline() else NotNow)(f"{path}: {_PARTLY}")
    return folder


def _all_is_known(name: str, snapshot: Path) -> bool:
    """Whether the cache knows which files the model has: transformers' loaders fetch only those that they read.

    snapshot_download leaves a list of all files; earlier versions, which did not, fetched .gitattributes if no patterns
    were given. Otherwise each decisive file must be there, or be known not to exist.
    """
    from huggingface_hub import get_cached_repo_tree, try_to_load_from_cache
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if (snapshot / ".gitattributes").is_file():
        return True
    try:
        return bool(get_cached_repo_tree(name, revision=snapshot.name))
    except CachedRepoTreeNotFoundError:
        return None not in [try_to_load_from_cache(name, file, revision=snapshot.name) for file in _DECISIVE]


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
