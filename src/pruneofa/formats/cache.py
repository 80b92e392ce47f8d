"""Folders that are read long after they were written: checksums of their files, and caches, made again when damaged."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from pruneofa.errors import InputError
from pruneofa.formats.files import file_fingerprint, new_folder, read_json, write_text
from pruneofa.formats.locks import exclusive
from pruneofa.progress import notice

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path, name: str = CHECKSUMS) -> None:
    """Read every file below `folder` and write its size and sha256 into the file `name`: {path: "SIZE SHA256"}."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / name)
    listed = {file.relative_to(folder).as_posix(): f"{file.stat().st_size} {file_fingerprint(file)}" for file in files}
    write_text(folder / name, json.dumps(listed, indent=2) + "\n")


def damage(folder: Path, name: str = CHECKSUMS) -> str | None:
    """What is not as `write_checksums` found it, as "file: reason"; None if nothing is. Reads every file.

    Within a process, files are read again only if their size or time of modification changed.
    """
    try:
        listed = read_json(folder / name)
    except InputError:
        return f"{name}: missing or not readable"
    for file, recorded in listed.items():
        path, (size, _, digest) = folder / file, str(recorded).partition(" ")
        if not path.is_file():
            return f"{file}: missing"
        status = path.stat()
        if str(status.st_size) != size:
            return f"{file}: {status.st_size} bytes, wanted {size}"
        if _digest(path, status.st_ino, status.st_size, status.st_mtime_ns) != digest:
            return f"{file}: not the bytes that were written"
    return None


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *_: int) -> str:
    return file_fingerprint(path)


def cached_folder(target: Path, make: Callable[[Path], None]) -> bool:
    """Whether the cache folder `target` was there, undamaged; if not, `make(folder)` fills it anew.

    Processes that want the same folder wait for the one that makes it. A damaged folder is named on stderr.
    """
    if target.is_dir() and damage(target) is None:  # no lock: reading works in a cache that may not be written to
        return True
    with exclusive(target, wait=True):
        found = damage(target) if target.is_dir() else "missing"
        if found is None:
            return True
        if target.is_dir():
            notice(f"pruneofa: warning: {target}: damaged ({found}); it is made again")
        with new_folder(target) as folder:
            make(folder)
            write_checksums(folder)
    return False
