"""Locks between processes: one at a time writes an output folder, a run's folder or a cache.

A lock is a file beside what it protects, locked by flock: the kernel releases it when its process ends, however that
happens. The file is removed by its owner, so whoever locked it checks that it is still the file at that path.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from pruneofa.errors import InputError

_TRIES = 100


@contextlib.contextmanager
def exclusive(target: Path, *, name: object = None, out: str = "OUT", wait: bool = False) -> Iterator[None]:
    """Hold the lock of `target`, which need not exist; its parent folder is created.

    Args:
        target: two paths of the same file must be equal, so links should be resolved before.
        name: what the message calls it, by default `target`.
        out: the command-line argument that gave it.
        wait: wait for another process instead of raising.

    Raises InputError if another process holds the lock.
    """
    path = target.with_name(f".{target.name}.pruneofa-lock")
    with _locked(path, wait) as held:
        if not held:
            raise InputError(
                f"{name or target}: another pruneofa is at work here; wait for it, or choose another {out}"
            )
        yield


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Create and lock a file, and remove it at the end; False if another process holds the lock."""
    missing = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = own_file(path, "lock")
        except FileNotFoundError:  # another process has just removed the folder; or, as in /proc, no file can be made
            if (missing := missing + 1) < _TRIES:
                continue
            raise InputError(f"{path.parent}: no file can be made in it; choose another folder") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _is_at(file, path):  # removed between opening and locking: the lock has no effect
                continue
            try:
                yield True
            finally:
                with contextlib.suppress(OSError):  # the lock is released in any case
                    path.unlink(missing_ok=True)
            return


def own_file(path: Path, kind: str) -> FileIO:
    """Open a file to read and append, or create it. Raises InputError for a link or anything else that pruneofa does
    not make: the folder may be someone else's, and the target anything. `kind` is what the message calls the file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # no FIFO is waited for
    try:
        file = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(file).st_mode):
            return FileIO(file, "ab+")
        os.close(file)
    raise InputError(f"{path}: is no regular file, wanted a {kind} that pruneofa makes itself; remove it")


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False
