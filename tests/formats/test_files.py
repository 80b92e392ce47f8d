import builtins
import errno
import io
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats import files


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullAfter(io.StringIO):
    """A file on a disk that fills up when the second half is written."""

    def __init__(self, path, *arguments, **options):
        super().__init__()
        self.file = REAL_OPEN(path, *arguments, **options)

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        full()

    def close(self):
        self.file.close()
        super().close()


REAL_OPEN = builtins.open


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "a" / "b.txt"
    files.write_text(file, "one")
    files.write_text(file, "zwei é")
    assert file.read_text(encoding="utf-8") == "zwei é"
    assert names(file.parent) == ["b.txt"]


@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch, fault):
    file = tmp_path / "state.json"
    files.write_json(file, {"step": 1})
    before = file.read_bytes()
    if fault == "write":
        monkeypatch.setattr(builtins, "open", FullAfter)
    else:
        monkeypatch.setattr(os, fault, full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        files.write_json(file, {"step": 2})
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert names(tmp_path) == ["state.json"]


def test_a_file_that_never_was_does_not_appear_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "open", FullAfter)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        files.write_text(tmp_path / "new.txt", "text")
    assert names(tmp_path) == []


def make(target, content, then=None):
    with files.new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(content)
        if then is not None:
            then()


def content(target):
    return (target / "sub" / "weights").read_text()


def test_a_folder_appears_when_its_block_is_done(tmp_path):
    target = tmp_path / "x" / "sparse"
    make(target, "one", lambda: target.exists() and pytest.fail("too early"))
    make(target, "two", lambda: content(target) == "one" or pytest.fail("the old one is gone too early"))
    assert content(target) == "two"
    assert names(target.parent) == ["sparse"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), InputError("x")]
)
def test_an_error_in_the_block_leaves_what_was_there(tmp_path, old, error):
    target = tmp_path / "sparse"
    if old:
        make(target, "one")

    def fail():
        raise error

    with pytest.raises(type(error)):
        make(target, "two", fail)
    assert names(tmp_path) == (["sparse"] if old else [])
    assert not old or content(target) == "one"


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
    target = tmp_path / "sparse"
    make(target, "one")
    replace, calls = os.replace, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            full()
        replace(*arguments)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        make(target, "two")
    assert content(target) == "one"
    assert names(tmp_path) == ["sparse"]


def test_a_flush_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "sparse"
    make(target, "one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        make(target, "two")
    assert content(target) == "one" and names(tmp_path) == ["sparse"]


def test_after_a_kill_in_the_block_the_old_folder_stands_and_the_next_try_succeeds(tmp_path):
    target = tmp_path / "sparse"
    make(target, "one")
    program = (
        "import os, pathlib, sys; from pruneofa.formats.files import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_text('half'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(target)])
    assert killed.returncode == -signal.SIGKILL
    assert content(target) == "one"
    make(target, "two")
    assert content(target) == "two" and not (target / "weights").exists()
    assert names(tmp_path) == ["sparse"]


NOT_OURS = ["{}.old", ".{}.tmp", ".{}.pruneofa-tmp", ".{}.00.pruneofa-old", ".other.0123456789abcdef.pruneofa-tmp"]


def test_folders_of_the_user_beside_it_are_kept(tmp_path):
    target = tmp_path / "thesis"
    theirs = [tmp_path / name.format("thesis") for name in NOT_OURS]
    for folder in theirs:
        folder.mkdir()
        (folder / "chapter").write_text("mine")
    make(target, "one")
    make(target, "two")
    assert content(target) == "two"
    assert {(folder / "chapter").read_text() for folder in theirs} == {"mine"}
    assert names(tmp_path) == sorted(["thesis", *(folder.name for folder in theirs)])


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_between_the_renames_loses_nothing(tmp_path, call):
    target = tmp_path / "sparse"
    make(target, "one")
    program = (
        "import os, sys; from pathlib import Path; from pruneofa.formats import files\n"
        "calls, replace = [], os.replace\n"
        "def killed(*paths):\n"
        "    calls.append(replace(*paths))\n"
        "    len(calls) == int(sys.argv[2]) and os.kill(os.getpid(), 9)\n"
        "os.replace = killed\n"
        "with files.new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'sub').mkdir(); (folder / 'sub' / 'weights').write_bytes(b'two')"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(target), str(call)])
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() == (call == 2)
    files.recover(target)
    assert content(target) == ("one" if call == 1 else "two")
    assert names(tmp_path) == ["sparse"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        make(tmp_path / "sparse", "one")
        files.write_text(tmp_path / "sparse" / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "sparse").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "sparse" / "file").stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/real")
    with files.new_output(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "weights").write_text("one")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "real" / "weights").read_text() == "one"
    assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk") == ["real"]


def test_an_output_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", tmp_path, ""):
        with pytest.raises(InputError, match=r"is the working folder or above it.*choose a folder in it"):
            files.output_folder(out)
    for out in ("/", "/proc"):
        with pytest.raises(InputError, match=r"is a mount point"):
            files.output_folder(out)
    for out in (tmp_path / "loop", "a\0b"):
        with pytest.raises(InputError, match=r"not a usable path"):
            files.output_folder(out)
    with pytest.raises(InputError, match=r"File name too long"), files.new_output("x" * 300):
        pass
    with pytest.raises(InputError, match=r"/proc: no file can be made in it"), files.new_output("/proc/x"):
        pass
    assert files.output_folder("out[v2]") == tmp_path / "here" / "out[v2]"


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES])
def test_an_output_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch, fault):
    def refused(path, *_):
        raise OSError(fault, os.strerror(fault), str(path))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(InputError, match=rf"{os.strerror(fault)}; choose a folder"), files.new_output(tmp_path / "o"):
        pass
    assert names(tmp_path) == []


def test_what_is_removed_is_whole_or_gone(tmp_path, monkeypatch):
    make(tmp_path / "checkpoint-3", "one")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        files.remove_folder(tmp_path / "checkpoint-3")
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-3").exists()
    files.recover_all(tmp_path)
    assert names(tmp_path) == []
    files.remove_folder(tmp_path / "checkpoint-3")  # what is not there is gone


def test_json_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot be read \(.+\)"):
        files.read_json(tmp_path)
    for bad in (b'{"a": ', b"\xff\xfe", b"", b"9" * 5000, b"[" * 100_000):
        (tmp_path / "half.json").write_bytes(bad)
        with pytest.raises(InputError, match=r"half\.json: not valid JSON .* incomplete: copy it again, or delete it"):
            files.read_json(tmp_path / "half.json")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_json_is_not_written(tmp_path, number):
    with pytest.raises(CheckFailed) as caught, files.new_folder(tmp_path / "sparse") as folder:
        files.write_json(folder / "metrics.json", {"seeds": [0, 1], "losses": {"mlm": [2.5, number]}})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'sparse' / 'metrics.json'}: losses.mlm[1] is {number}, wanted a finite")
    assert "learning rate" in message and "\n" not in message
    assert names(tmp_path) == []


def test_fingerprints_follow_content_not_order(tmp_path):
    assert files.fingerprint({"a": 1, "b": [1, 2]}) == files.fingerprint({"b": [1, 2], "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"same")
    assert files.file_fingerprint(tmp_path / "one") == files.file_fingerprint(tmp_path / "two")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("free, code", [(0, errno.ENOSPC), (1 << 40, errno.EIO)], ids=["full", "failing"])
def test_torch_does_not_say_why_it_could_not_write_so_the_disk_is_asked(tmp_path, monkeypatch, free, code):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as raised, files.naming_disk(tmp_path / "out"):
        torch.save({"a": torch.zeros(3)}, "/dev/full")
    assert raised.value.errno == code and raised.value.filename == str(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_an_error_that_a_library_in_rust_says_in_words_is_that_of_the_system(tmp_path, code):
    said = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as raised, files.naming_disk(tmp_path / "out"):
        raise SafetensorError(said)
    assert raised.value.errno == code and raised.value.filename == str(tmp_path / "out")


def test_an_error_of_reading_by_torch_is_not_of_the_disk(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-60])
    with pytest.raises(RuntimeError, match="PytorchStreamReader"), files.naming_disk(tmp_path / "out"):
        torch.load(tmp_path / "a.pt", weights_only=True)
