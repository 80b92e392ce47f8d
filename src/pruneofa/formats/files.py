"""Atomic writes (temporary name, fsync, rename), strict JSON, and fingerprints.

Names of temporary and replaced files and folders are `.NAME.HEX.pruneofa-tmp` and `-old`, HEX being drawn by the call
that made them. Only these are deleted, by that call, or by a later one under the lock of NAME (decision 0015).
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from pruneofa.errors import (
    UNWRITABLE,
    CheckFailed,
    InputError,
    disk_is_full,
    first_line,
    system_error,
    torch_could_not_write,
)
from pruneofa.formats.locks import exclusive

MAX_JSON = 4 << 20  # bytes; a manifest of 24 layers needs 0.1 MB
_FULL = 1 << 20  # bytes: a disk with less is full
_AGAIN = "it may be incomplete: copy it again, or delete it"


_MARKED = re.compile(r"\.(.+)\.[0-9a-f]{16}\.pruneofa-(tmp|old)", re.DOTALL)


def marked(path: Path, kind: str) -> Path:
    """A name beside `path` that no one else has, for a temporary ("tmp") or replaced ("old") file or folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.pruneofa-{kind}")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextlib.contextmanager
def naming_disk(path: Path) -> Iterator[None]:
    """Raise errors of a full or failing disk as OSError with the name of what was written: write(2) knows no names."""
    try:
        yield
    except Exception as error:
        code = errno.ENOSPC if disk_is_full(error) else system_error(error)
        if code is None and torch_could_not_write(error):
            code = errno.ENOSPC if _free(path) < _FULL else errno.EIO
        nameless = () if isinstance(error, OSError) else UNWRITABLE
        if code is None or isinstance(error, InputError) or code not in (errno.ENOSPC, errno.EIO, *nameless):
            raise
        # Of a copy, the second name is the one that was written.
        name = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
        told = getattr(error, "strerror", None) if code == errno.EIO else None
        raise OSError(code, told or os.strerror(code), str(in_place(Path(name)))) from error


def _free(path: Path) -> int:
    """Bytes that are free on the disk of a file or folder, or of the folder that will hold it."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target`; the file written there becomes `target` only if the block succeeds."""
    temporary = marked(target, "tmp")
    try:
        with naming_disk(target):
            yield temporary
            sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically: after a crash the file has the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON.

    Raises CheckFailed, which names the key, for NaN and infinity: JSON has no such numbers, and `read_json` refuses
    them.
    """
    for key, number in _not_finite(value):
        raise CheckFailed(
            f"{in_place(path)}: {key} is {number}, wanted a finite number; the file was not written; "
            "if training produced the number, training diverged: lower its learning rate"
        )
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float holds: an integer may have hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def in_place(path: Path) -> Path:
    """The path with its final name, after `new_folder` has renamed the temporary folder."""
    return Path(*(found[1] if (found := _MARKED.fullmatch(part)) else part for part in path.parts))


def _not_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(dotted key, number) of every NaN and infinity in a JSON value."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key or "the value", value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{key}[{index}]")


def read_json(path: Path, advice: str = _AGAIN, limit: int = MAX_JSON) -> dict[str, Any]:
    """The object of a JSON file of at most `limit` bytes; see `parse_json`.

    Raises InputError, with the file's name and `advice` on what to do, if it cannot be read or is not such an object.
    """
    return parse_json(read_bytes(path, limit, advice), str(path), advice)


def is_there(path: Path) -> bool:
    """Whether a folder has anything of this name, also a link to nothing or a FIFO, which reading then refuses.

    For files that may be missing: one that cannot be read must not count as missing, or it is another model.
    """
    return os.path.lexists(path)


def read_optional(path: Path, advice: str = _AGAIN, limit: int = MAX_JSON) -> dict[str, Any]:
    """`read_json` of a file that may be missing, then {}."""
    return read_json(path, advice, limit) if is_there(path) else {}


def read_json_list(path: Path, advice: str = _AGAIN, limit: int = MAX_JSON) -> list[Any]:
    """`read_json` of a file that holds an array."""
    return _parse(read_bytes(path, limit, advice), str(path), advice, list)


def parse_json(raw: bytes, where: str, advice: str = _AGAIN) -> dict[str, Any]:
    """A JSON object: UTF-8, no duplicate keys (parsers treat them differently), no NaN. Raises InputError."""
    return _parse(raw, where, advice, dict)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises OSError for anything else; a FIFO or a device is not waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, _: os.open(name, flags))  # noqa: SIM115 - for the caller to close
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: Path, limit: int, advice: str = _AGAIN) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises InputError, before reading, for any other."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = b"" if size > limit else file.read(size)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"{path}: {reason}; {advice}") from None
    if size > limit:
        raise InputError(f"{path}: larger than {limit} bytes ({size}); {advice}")
    return raw


def _parse(raw: bytes, where: str, advice: str, kind: type[dict] | type[list]) -> Any:
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits, and deep nesting
        raise InputError(f"{where}: not valid JSON ({first_line(error)}); {advice}") from None
    if not isinstance(found, kind):
        wanted = "object" if kind is dict else "array"
        raise InputError(f"{where}: wanted a JSON {wanted}, got {type(found).__name__}; {advice}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target` that becomes `target` only if the block succeeds.

    An existing folder is kept until the new one is in place. If `target` is a link, the folder it points to is
    replaced. The caller holds the lock of `target`: what killed calls left is removed, or put back, first.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    temporary = marked(target, "tmp")
    temporary.mkdir()
    try:
        with naming_disk(target):
            yield temporary
            _share(temporary)
            sync_tree(temporary)
            _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share(folder: Path) -> None:
    """Let others read the files of a folder as far as the umask does: safetensors makes its for the owner alone."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | readable)


def _put_in_place(temporary: Path, target: Path) -> None:
    old = None
    try:
        if target.is_dir() and any(target.iterdir()):  # the rename replaces an empty folder by itself
            old = marked(target, "old")
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old is not None and old.exists():
            os.replace(old, target)
        raise
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Remove what killed calls left beside `target`; a replaced folder is put back if no other took its place.

    The caller holds the lock of `target`.
    """
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        found = _MARKED.fullmatch(path.name)
        if found is None or found[1] != target.name:
            continue
        if found[2] == "old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def recover_like(folder: Path, pattern: str) -> None:
    """`recover` everything in `folder` whose name matches a glob pattern; the caller holds its lock."""
    for path in sorted(folder.glob(f".{pattern}.*.pruneofa-*")):
        if found := _MARKED.fullmatch(path.name):
            recover(path.with_name(found[1]))


def recover_all(folder: Path) -> None:
    """`recover` everything below `folder`, whose lock the caller holds."""
    for path in sorted(folder.rglob(".*.pruneofa-*")):
        if found := _MARKED.fullmatch(path.name):
            recover(path.with_name(found[1]))


def remove_folder(folder: Path) -> None:
    """Delete a folder that this program made. After a kill it is whole, or gone from its name."""
    doomed = marked(folder, "tmp")
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def output_folder(out: str | Path) -> Path:
    """The absolute path of a folder that will be written as a whole, links resolved.

    Raises InputError if it cannot be replaced: the working folder, one above it, or a mount point.
    """
    try:
        target = Path(out).expanduser().resolve()
        mounted = os.path.ismount(target)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is too long, a null byte
        raise InputError(f"{out}: not a usable path ({first_line(error)}); choose another folder") from None
    if mounted:
        raise InputError(f"{out}: is a mount point, which cannot be replaced; choose a folder in it")
    if Path.cwd().is_relative_to(target):
        raise InputError(f"{out}: is the working folder or above it, and cannot be replaced; choose a folder in it")
    return target


def user_path(path: str | Path) -> Path:
    """The path with ~ and ~name as the folders they stand for. Raises InputError where there is no such user."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):  # no such user; a null byte
        raise InputError(f"{path}: there is no home folder of that name; give the whole path") from None


@contextlib.contextmanager
def new_output(out: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block succeeds.

    Raises InputError if `out` is not empty, cannot be written, or another process is at work on it.
    """
    target = output_folder(out)
    try:
        with exclusive(target, name=out):
            recover(target)
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise InputError(f"{out}: exists and is not an empty folder; choose another folder, or remove it first")
            with new_folder(target) as temporary:
                yield temporary
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(f"{error.filename or out}: {error.strerror}; choose a folder that you may write to") from None


def cache_root() -> Path:
    """Folder of cached files, which can be recreated: PRUNEOFA_CACHE, else ~/.cache/pruneofa."""
    return user_path(os.environ.get("PRUNEOFA_CACHE") or "~/.cache/pruneofa")


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON-serializable value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Hex sha256 of the bytes of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
