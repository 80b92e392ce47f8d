"""The folder that the workers of a server share."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "pruneofa-metrics-"


@contextlib.contextmanager
def metrics_folder() -> Iterator[Path]:
    """A new folder for metrics, removed at the end.

    Those that killed servers left are removed first. In a folder is a file that its server locked, and that is so while
    the server or one of its workers lives.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_left(folder)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, open(f"{name}/new", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(f"{name}/new", f"{name}/lock")  # by this name there is none that is not locked yet
        yield Path(name)


def _remove_left(folder: Path) -> None:
    try:
        if folder.lstat().st_uid != os.geteuid():
            return
        file = os.open(folder / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # another server makes or removes it
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(file)
