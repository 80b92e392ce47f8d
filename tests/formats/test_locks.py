"""One process at a time: the others are told, or wait; a kill releases the lock; no lock is taken twice."""

import os
import subprocess
import sys
import threading

import pytest

from pruneofa.errors import InputError
from pruneofa.formats.locks import exclusive

COUNT = """
import sys; from pathlib import Path; from pruneofa.formats.locks import exclusive
file = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with exclusive(file, wait=True):
        file.write_text(str(int(file.read_text()) + 1))
"""


def test_the_second_is_told_in_one_line(tmp_path):
    told = pytest.raises(
        InputError, match=r"packed: another pruneofa is at work here; wait for it, or choose another OUT"
    )
    with exclusive(tmp_path / "packed"), told, exclusive(tmp_path / "packed"):
        pass
    assert list(tmp_path.iterdir()) == []
    with exclusive(tmp_path / "packed"), exclusive(tmp_path / "other"):
        pass


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_lock_that_is_no_file_of_ours_is_refused_at_once(tmp_path, kind):
    """A folder from someone else may have one that leads to another file, which would be emptied, or blocks."""
    other, lock = tmp_path / "other", tmp_path / ".packed.pruneofa-lock"
    other.write_text("mine")
    {"link": lambda: lock.symlink_to(other), "fifo": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(InputError, match="is no regular file, wanted a lock"), exclusive(tmp_path / "packed"):
        pass
    assert other.read_text() == "mine"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_wait_take_turns(tmp_path, processes):
    file = tmp_path / "count"
    file.write_text("0")
    command = [sys.executable, "-c", COUNT, str(file), "200"]
    running = [subprocess.Popen(command) for _ in range(processes)]
    assert [process.wait() for process in running] == [0] * processes
    assert file.read_text() == str(200 * processes)
    assert list(tmp_path.iterdir()) == [file]


def test_a_kill_releases_it(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from pruneofa.formats.locks import exclusive\n"
        "with exclusive(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == [".out.pruneofa-lock"]
    with exclusive(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_waits_goes_on_when_the_other_ends(tmp_path):
    order = []

    def second():
        with exclusive(tmp_path / "cache", wait=True):
            order.append("second")

    with exclusive(tmp_path / "cache"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
