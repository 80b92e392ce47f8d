"""Atomic writes (temporary name, fsync, rename), strict JSON, and fingerprints."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pruneofa.errors import CheckFailed, InputError, first_line

COMPLETE = "complete"
MAX_JSON = 4 << 20  # bytes; a manifest of 24 layers needs 0.1 MB
_AGAIN = "it may be incomplete: copy it again, or delete it"


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically: after a crash the file has the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON.

    Raises CheckFailed, which names the key, for NaN and infinity: JSON has no such numbers, and `read_json` refuses
    them.
    """
    for key, number in _not_finite(value):
        raise CheckFailed(
            f"{_in_place(path)}: {key} is {number}, wanted a finite number; the file was not written; "
            "if training produced the number, training diverged: lower its learning rate"
        )
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _in_place(path: Path) -> Path:
    """The path with its final name, after `new_folder` has renamed the temporary folder."""
    return Path(*(part[1:-4] if part.startswith(".") and part.endswith(".tmp") else part for part in path.parts))


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


def read_json_list(path: Path, advice: str = _AGAIN, limit: int = MAX_JSON) -> list[Any]:
    """`read_json` of a file that holds an array."""
    return _parse(read_bytes(path, limit, advice), str(path), advice, list)


def parse_json(raw: bytes, where: str, advice: str = _AGAIN) -> dict[str, Any]:
    """A JSON object: UTF-8, no duplicate keys (parsers treat them differently), no NaN. Raises InputError."""
    return _parse(raw, where, advice, dict)


def open_regular(path: Path) -> BinaryIO:
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

    An existing folder at `target` is kept as `target.old` until the new one is in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        old = target.with_name(f"{target.name}.old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_output(out: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block succeeds. Raises InputError if `out` is not empty."""
    target = Path(out).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another folder, or remove it first")
    try:
        with new_folder(target) as temporary:
            yield temporary
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{error.filename or out}: {error.strerror}; choose a folder that you may write to") from None


def cache_root() -> Path:
    """Folder of cached files, which can be recreated: PRUNEOFA_CACHE, else ~/.cache/pruneofa."""
    return Path(os.environ.get("PRUNEOFA_CACHE") or "~/.cache/pruneofa").expanduser()


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON-serializable value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Hex sha256 of the bytes of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
