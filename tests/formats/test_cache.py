"""A cache folder is made once, by one of the processes that want it, and again when it is damaged."""

import subprocess
import sys

import pytest

from pruneofa.formats.cache import cached_folder, damage, write_checksums

MAKE = """
import os, sys, time; from pathlib import Path; from pruneofa.formats.cache import cached_folder
def make(folder):
    (folder / "weights").write_bytes(b"one" * 1000)
    time.sleep(0.2)
    (folder / str(os.getpid())).write_text("made by")
print(cached_folder(Path(sys.argv[1]), make))
"""


def make(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(b"one" * 1000)
    (folder / "empty").write_bytes(b"")


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_that_want_it_at_once_make_it_once(tmp_path, processes):
    command = [sys.executable, "-c", MAKE, str(tmp_path / "cache" / "x")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    said = sorted(process.communicate()[0].strip() for process in running)
    assert said == ["False"] + ["True"] * (processes - 1)
    assert len(list((tmp_path / "cache" / "x").iterdir())) == 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (flip, "sub/weights: not the bytes that were written"),
        (lambda file: file.write_bytes(file.read_bytes()[:1500]), "sub/weights: 1500 bytes, wanted 3000"),
        (lambda file: file.unlink(), "sub/weights: missing"),
        (lambda file: (file.parents[1] / "checksums.json").write_text("{"), "checksums.json: missing or not readable"),
    ],
)
def test_a_damaged_one_is_named_and_made_again(tmp_path, capsys, spoil, what):
    target = tmp_path / "x"
    assert [cached_folder(target, make), cached_folder(target, make)] == [False, True]
    spoil(target / "sub" / "weights")
    assert damage(target) == what
    assert not cached_folder(target, make)
    assert capsys.readouterr().err == f"pruneofa: warning: {target}: damaged ({what}); it is made again\n"
    assert damage(target) is None and cached_folder(target, make)


def test_every_flipped_bit_is_found(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(64)))
    write_checksums(tmp_path)
    for bit in range(0, 8 * 64, 5):
        data = bytearray(range(64))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        assert damage(tmp_path) == "weights: not the bytes that were written"


def test_what_is_whole_is_read_once(tmp_path, monkeypatch):
    make(tmp_path)
    write_checksums(tmp_path)
    assert damage(tmp_path) is None
    monkeypatch.setattr("pruneofa.formats.cache.file_fingerprint", lambda _: pytest.fail("read again"))
    assert damage(tmp_path) is None
