"""The log of a run outlives kills and full disks: what is whole is read, and the next event starts on its own line."""

import errno
import io
import json
import os

import pytest

from pruneofa.errors import InputError
from pruneofa.run import events
from pruneofa.run.events import append_event, read_events

TORN = [b'{"event": "lo', b"\0" * 100, b'{"event": "\xc3', b'{"event": "log"}' + b"\0" * 7, b"[" * 100_000]


def steps(log):
    return [event["step"] for event in read_events(log)]


def test_a_log_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "log.jsonl").symlink_to("other")
    with pytest.raises(InputError, match="is no regular file, wanted a log"):
        append_event(tmp_path / "log.jsonl", {"step": 1})
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_skipped_and_mended(tmp_path, torn):
    log = tmp_path / "log.jsonl"
    append_event(log, {"step": 1})
    whole = log.read_bytes()
    log.write_bytes(whole + torn)
    assert steps(log) == [1]
    append_event(log, {"step": 2})
    assert log.read_bytes().startswith(whole) and steps(log) == [1, 2]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("torn", TORN)
def test_a_log_of_nothing_else(tmp_path, torn):
    (tmp_path / "log.jsonl").write_bytes(torn)
    assert read_events(tmp_path / "log.jsonl") == []
    append_event(tmp_path / "log.jsonl", {"step": 1})
    assert steps(tmp_path / "log.jsonl") == [1]


def test_no_log_has_no_events(tmp_path):
    assert read_events(tmp_path / "log.jsonl") == []


def test_a_line_joined_by_an_earlier_version_is_skipped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st{"step": 2}\n7\n{"step": 3}\n')
    assert steps(tmp_path / "log.jsonl") == [1, 3]


def test_a_full_disk_names_the_log_and_leaves_whole_lines(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    append_event(log, {"step": 1})

    class Full(io.FileIO):
        def write(self, data):
            if len(data) < 10:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:-5])

    monkeypatch.setattr(events, "own_file", lambda path, _: Full(path, "ab+"))
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.jsonl'"):
        append_event(log, {"step": 2})
    monkeypatch.undo()
    assert steps(log) == [1] and log.read_bytes().endswith(b"\n")
