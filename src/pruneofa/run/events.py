"""The events of a run, one JSON object per line of its log.jsonl."""

import json
import os
import time
from pathlib import Path
from typing import Any

from pruneofa.formats.files import naming_disk
from pruneofa.formats.locks import own_file

LOG = "log.jsonl"


def append_event(log: Path, event: dict[str, Any]) -> None:
    """Append an event to a log; a last line that a kill or a full disk left unfinished is removed first."""
    _append(log, (json.dumps({"time": round(time.time(), 1), **event}) + "\n").encode())


def append_events(log: Path, other: Path) -> None:
    """Move the events of another log to the end of a log."""
    if not log.exists() and not log.is_symlink():
        os.replace(other, log)
        return
    _append(log, other.read_bytes())
    other.unlink()


def _append(log: Path, data: bytes) -> None:
    with naming_disk(log), own_file(log, "log") as file:
        end = _end_of_lines(file)
        file.truncate(end)
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            file.truncate(end)
            raise


def read_events(log: Path) -> list[dict[str, Any]]:
    """The events of a log, [] if there is none. Lines that are not complete are skipped."""
    if not log.exists():
        return []
    found = []
    for line in log.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # an empty line, or one that was not written to its end
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def _end_of_lines(file: Any) -> int:
    """The position after the last line break of an open file."""
    end = file.seek(0, 2)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
