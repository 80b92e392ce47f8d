"""Full, failing and read-only disks: what was there survives, the error is one line, the same command goes on.

The calls of the system fail by storage_faults.c, which is compiled here and loaded before Python, in a pytest of its
own. Each test prints its figures as a line of JSON, see test_faults.py.
"""

import collections
import ctypes
import errno
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.slow.children import (
    COUNT,
    QUICK_FIRST,
    TRAINING,
    VERBS,
    Child,
    command,
    contents,
    finished,
    out_of,
    own_cache,
    record,
    user_files,
    whole_or_absent,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(10 * 3600)]

SOURCE = Path(__file__).with_name("storage_faults.c")
LIBRARY = os.environ.get("PRUNEOFA_STORAGE_FAULTS")
WRITE, CREATE, FLUSH = 1, 2, 4
# How a disk fails, and the calls that fail then.
KINDS = {"ENOSPC": WRITE | CREATE, "EROFS": CREATE, "EIO": WRITE | FLUSH}


@pytest.mark.skipif(LIBRARY is not None, reason="runs the others")
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_calls_of_the_system_that_fail(tmp_path):
    library = tmp_path / "storage_faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", SOURCE, "-o", library, "-ldl"], check=True)
    injected = [sys.executable, "-m", "pytest", "-s", "-m", "slow", "-k", "injected", __file__]
    environment = os.environ | {"LD_PRELOAD": str(library), "PRUNEOFA_STORAGE_FAULTS": str(library)}
    ended = subprocess.run(injected, env=environment, text=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    sys.stdout.write(ended.stdout)
    assert ended.returncode == 0


@pytest.fixture
def faults():
    """storage_faults.c; only a child arms it."""
    if LIBRARY is None:
        pytest.skip("test_calls_of_the_system_that_fail runs it")
    return ctypes.CDLL(LIBRARY)


def count_calls(faults, verb, folder, kinds):
    """How many calls of these kinds an undisturbed run of a verb makes."""

    def prepare():
        own_cache(folder)
        faults.storage_fault_arm(os.fsencode(folder), 0, 0, kinds, 0)
        end = os._exit
        counted = folder.with_name("calls")
        os._exit = lambda code: (counted.write_text(str(faults.storage_fault_calls())), end(code))

    code, said = Child(command(verb, out_of(verb, folder)), prepare).wait()
    assert code == 0, said
    return int(folder.with_name("calls").read_text())


@pytest.mark.parametrize("failure", KINDS)
@pytest.mark.parametrize("verb", QUICK_FIRST)
def test_injected_failure_of_a_call(verb, failure, straight, faults, tmp_path):
    """Every call fails once, or COUNT of them (training: over all verbs); every second time all later ones fail too."""
    draw, codes, begin = random.Random(verb + failure), collections.Counter(), time.monotonic()
    straight[verb]  # makes what it reads
    calls = count_calls(faults, verb, user_files(tmp_path / "counted"), KINDS[failure])
    tried = range(1, calls + 1)
    if calls > (most := max(4, COUNT // len(VERBS) if verb in TRAINING else COUNT)):
        tried = sorted(draw.sample(tried, most))
    for number, nth in enumerate(tried):
        folder = user_files(tmp_path / str(nth))
        out = out_of(verb, folder)

        def prepare(folder=folder, nth=nth, stays=number % 2):
            own_cache(folder)
            code = getattr(errno, failure)
            faults.storage_fault_arm(os.fsencode(folder), nth, code, KINDS[failure], stays)

        ended, said = Child(command(verb, out), prepare).wait()
        codes[ended] += 1
        whole_or_absent(verb, out, straight)
        if ended:
            errors = [line for line in said.splitlines() if line.startswith("pruneofa: error: ")]
            assert ended in (2, 3) and errors == [said.splitlines()[-1]], (ended, nth, said)
            assert str(folder) in errors[0], (nth, said)
        finished(verb, out, straight)
        shutil.rmtree(folder)
    record(test="calls that fail", verb=verb, failure=failure, calls=calls, tried=len(tried), exit_codes=codes,
           same_bytes=len(tried), seconds=round(time.monotonic() - begin))  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of so many KiB, or resizes it; skipped where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib, *options):
        again = ["remount"] if os.path.ismount(folder) else []
        words = ",".join([*again, f"size={kib}k", *options])
        if subprocess.run(["mount", "-t", "tmpfs", "-o", words, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("may not mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize("verb", QUICK_FIRST)
def test_a_small_disk(verb, straight, disk):
    """A real file system, which takes the first half of a write; it grows until the verb ends."""
    straight[verb]
    room, codes = 8, collections.Counter()
    while True:
        folder = disk(room)
        out = out_of(verb, folder)
        code, said = Child(command(verb, out), partial(own_cache, folder)).wait()
        codes[code] += 1
        whole_or_absent(verb, out, straight)
        if code == 0:
            break
        errors = [line for line in said.splitlines() if line.startswith("pruneofa: error: ")]
        assert code == 3 and errors == [said.splitlines()[-1]] and "disk full" in errors[0], (room, said)
        assert str(folder) in errors[0] and "the same command resumes" in errors[0]
        room = room + 1 + room // (1 + COUNT // 25)
    assert contents(out) == straight[verb][0]
    record(test="a small disk", verb=verb, sizes_too_small=codes[3], largest_kib=room, exit_codes=codes)


def test_a_disk_that_is_read_only(straight, disk):
    for verb in VERBS:
        straight[verb]
        disk(4096, "ro")
        code, said = Child(command(verb, out_of(verb, disk(4096, "ro")))).wait()
        assert code == 2 and os.strerror(errno.EROFS) in said.splitlines()[-1], said
    record(test="a read-only disk", verbs=list(VERBS), exit_codes={2: len(VERBS)})
