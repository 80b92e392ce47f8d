"""Kills, clocks that jump, full and failing disks, and several processes on one OUT: nothing is lost.

Every verb is called in a forked child, so that a kill costs no imports. PRUNEOFA_FAULTS is the number of kills, and of
injected faults of each kind, over all verbs (default 100). Figures are printed; see them with pytest -s.
"""

import builtins
import collections
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pruneofa.formats.files import file_fingerprint
from tests.small import write_task, write_text
from tests.tiny import tiny_bert, write_model

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("PRUNEOFA_FAULTS", "100"))
FULL = os.strerror(errno.ENOSPC)
TEXT = ["--corpus.source", "text.jsonl", "--corpus.max_length", "32", "--corpus.validation", "0.2"]
STEPS = ["--teacher.steps", "6", "--teacher.batch", "8", "--teacher.lr", "1e-3", "--teacher.save_steps", "2",
         "--prune.steps", "12", "--prune.batch", "8", "--prune.lr", "1e-3", "--prune.save_steps", "2"]  # fmt: skip
TASK = ["--data", "task.csv", "--validation", "validation.csv", "--text", "sentence", "--label", "verdict",
        "--batch", "16", "--max-length", "32", "--precision", "fp32"]  # fmt: skip
SCHEDULE = ["--prune.end", "6", "--prune.stop", "9", "--prune.interval", "1"]
VERBS = {
    "prune": ["prune", "model", "OUT", *TEXT, "--precision", "fp32", *STEPS, *SCHEDULE],
    "transfer": ["transfer", "sparse", "OUT", *TASK, "--epochs", "2", "--lr", "1e-3"],
    "quantize": ["quantize", "transfer", "OUT", *TASK, "--qat_epochs", "1"],
    "pack": ["pack", "transfer", "OUT", "--compress"],
    "unpack": ["unpack", "pack", "OUT"],
    "export": ["export", "quantize", "OUT", "--to", "compressed-tensors"],
}


class Child:
    """A verb in a forked process; `prepare` is called in it before."""

    def __init__(self, arguments, prepare=lambda: None):
        self.log = Path(f"/tmp/pruneofa-faults-{os.getpid()}-{time.monotonic_ns()}")
        self.process = os.fork()
        if self.process == 0:
            code = 99
            try:
                descriptor = os.open(self.log, os.O_CREAT | os.O_WRONLY)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                prepare()
                from pruneofa.cli.main import main

                code = main(arguments)
            except SystemExit as stop:  # wrong arguments
                code = stop.code
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def wait(self, seconds=None):
        """(exit code, output); after `seconds` it is killed. A traceback is a failure."""
        until = time.monotonic() + (300 if seconds is None else seconds)
        while (ended := os.waitpid(self.process, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                assert seconds is not None, "hangs"
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.002)
        said = self.log.read_text(errors="replace")
        self.log.unlink()
        assert "Traceback" not in said, said
        return os.waitstatus_to_exitcode(ended[1]), said


def contents(folder):
    """The bytes of every file below a folder that hold the result, by their hash; None if there is no folder."""
    if not folder.exists():
        return None
    volatile = {"stage.json", "evaluation.json", "log.jsonl", "export.json"}  # they hold times
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in volatile)
    return {str(path.relative_to(folder)): file_fingerprint(path) for path in files}


def command(verb, out):
    return [str(out) if word == "OUT" else word for word in VERBS[verb]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with the inputs and the undisturbed result of every verb: {verb: (contents, seconds)}."""
    import torch

    import pruneofa.export.export
    import pruneofa.formats.pack
    import pruneofa.run.single  # noqa: F401 - imported once, before the forks

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("faults")
    before = Path.cwd()
    os.chdir(root)
    write_model(root / "model", tiny_bert())
    write_text(root / "text.jsonl")
    write_task(root / "task.csv")
    write_task(root / "validation.csv", rows=40, seed=1)
    results = {}
    for verb in VERBS:
        out = root / ("sparse" if verb == "prune" else verb)
        start = time.monotonic()
        code, said = Child(command(verb, out)).wait()
        assert code == 0, said
        results[verb] = contents(out), time.monotonic() - start
    yield results
    os.chdir(before)


def whole_or_absent(verb, out, straight):
    found = contents(out)
    if found is not None and "metrics.json" in straight[verb][0] and "metrics.json" not in found:
        found["metrics.json"] = straight[verb][0]["metrics.json"]  # trained, and not evaluated yet
    assert found in (None, straight[verb][0])


def finished(verb, out, straight):
    """The same command ends with the same bytes, and leaves nothing beside them."""
    code, said = Child(command(verb, out)).wait()
    if verb in ("pack", "unpack", "export") and code == 2:
        assert "exists and is not an empty folder" in said  # it was complete already
    else:
        assert code == 0, said
    assert contents(out) == straight[verb][0]
    assert {path.name for path in out.parent.iterdir()} <= {"out", "out-teacher", "mine.old", ".out.tmp"}


def user_files(folder):
    for name in ("mine.old", ".out.tmp"):
        (folder / name).mkdir()
        (folder / name / "mine").write_text("mine")


def confuse_clock(draw, folder):
    """Times of modification jump, as they do when a clock is set, or a folder is copied."""
    for path in folder.rglob("*"):
        when = time.time() + draw.uniform(-1e6, 1e6)
        os.utime(path, (when, when), follow_symlinks=False)


def jumping_time():
    draw, real = random.Random(0), time.time
    time.time = lambda: real() + draw.uniform(-1e6, 1e6)


@pytest.mark.parametrize("verb", VERBS)
def test_kills_at_random_moments_while_the_clock_jumps(verb, straight, tmp_path):
    draw, kills, ends = random.Random(verb), 0, 0
    wanted = -(-COUNT // len(VERBS))
    while kills < wanted:
        folder = tmp_path / str(ends)
        folder.mkdir()
        user_files(folder)
        for _ in range(min(8, wanted - kills)):
            code, _ = Child(command(verb, folder / "out"), jumping_time).wait(draw.uniform(0, 1.1 * straight[verb][1]))
            whole_or_absent(verb, folder / "out", straight)
            confuse_clock(draw, folder)
            kills += code == -signal.SIGKILL
            if code != -signal.SIGKILL:
                break
        finished(verb, folder / "out", straight)
        assert (folder / "mine.old" / "mine").exists() and (folder / ".out.tmp" / "mine").exists()
        ends += 1
    sys.stdout.write(f"{verb}: {kills} kills, {ends} times brought to the end, all with the same bytes" + "\n")


class Faults:
    """The n-th call that opens for writing, makes, flushes or renames below a folder fails; `n` is random."""

    def __init__(self, below, n, code):
        self.below, self.left, self.code = str(below), n, code

    def hit(self, path):
        named = [str(path)] if not isinstance(path, int) else []
        if not named:
            path = os.readlink(f"/proc/self/fd/{path}")
        if not os.path.abspath(path).startswith(self.below):
            return
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code), *named)

    def install(self):
        makes = os.mkdir
        for name in ("fsync", "replace", "mkdir"):
            real = getattr(os, name)

            def call(path, *rest, real=real, **options):
                if real is not makes or not os.path.isdir(path):
                    self.hit(path)
                return real(path, *rest, **options)

            setattr(os, name, call)
        real_open = builtins.open

        def opened(path, mode="r", *rest, **options):
            if not isinstance(path, int) and set(mode) & set("wax+"):
                self.hit(path)
            return real_open(path, mode, *rest, **options)

        builtins.open = opened


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=["ENOSPC", "EROFS", "EIO"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fails_at_any_call(verb, code, straight, tmp_path):
    draw, codes = random.Random(verb), collections.Counter()
    for number in range(max(3, COUNT // len(VERBS))):
        folder = tmp_path / str(number)
        folder.mkdir()
        user_files(folder)
        n = number + 1 if number % 2 == 0 else draw.randint(1, 120 if "metrics.json" in straight[verb][0] else 20)
        ended, said = Child(command(verb, folder / "out"), Faults(folder, n, code).install).wait()
        codes[ended] += 1
        whole_or_absent(verb, folder / "out", straight)
        if ended:
            errors = [line for line in said.splitlines() if line.startswith("pruneofa: error: ")]
            assert ended in (2, 3) and errors == [said.splitlines()[-1]], (ended, n, said)
            assert str(folder) in errors[0]
        finished(verb, folder / "out", straight)
    sys.stdout.write(
        f"{verb}, {errno.errorcode[code]}: exit codes {dict(codes)}, all brought to the end with the same bytes" + "\n"
    )


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


@pytest.mark.parametrize("verb", VERBS)
def test_a_small_disk(verb, straight, disk):
    room, codes = 8, collections.Counter()
    while True:
        folder = disk(room)
        code, said = Child(command(verb, folder / "out")).wait()
        codes[code] += 1
        whole_or_absent(verb, folder / "out", straight)
        if code == 0:
            break
        errors = [line for line in said.splitlines() if line.startswith("pruneofa: error: ")]
        assert code == 3 and errors == [said.splitlines()[-1]] and "disk full" in errors[0], (room, said)
        assert str(folder) in errors[0] and "the same command resumes" in errors[0]
        room = room + 1 + room // (1 + COUNT // 25)
    assert contents(folder / "out") == straight[verb][0]
    sys.stdout.write(
        f"{verb}: {codes[3]} sizes of the disk too small, up to {room} KiB; every time resumed, the same bytes" + "\n"
    )


def test_a_disk_that_is_read_only(straight, disk):
    for verb in VERBS:
        disk(4096, "ro")
        code, said = Child(command(verb, disk(4096, "ro") / "out")).wait()
        assert code == 2 and os.strerror(errno.EROFS) in said.splitlines()[-1], said


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("verb", VERBS)
def test_processes_on_one_out(verb, processes, straight, tmp_path):
    rounds, codes = max(1, COUNT // (len(VERBS) * 10)), collections.Counter()
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        user_files(folder)
        children = [Child(command(verb, folder / "out")) for _ in range(processes)]
        ended = [child.wait() for child in children]
        for code, said in ended:
            if code:
                reasons = ("another pruneofa is at work", "exists and is not an empty folder", "did not make it")
                assert code == 2 and any(reason in said.splitlines()[-1] for reason in reasons), said
        codes += collections.Counter(code for code, _ in ended)
        assert 0 in [code for code, _ in ended]
        finished(verb, folder / "out", straight)
    sys.stdout.write(f"{verb}, {processes} processes: exit codes {dict(codes)}" + "\n")


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_on_one_conversion(processes, straight, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    binary = tmp_path / "binary"
    write_model(binary, tiny_bert())
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    monkeypatch.setenv("PRUNEOFA_CACHE", str(tmp_path / "cache"))
    children = [Child(["inspect", str(binary), "--json"]) for _ in range(processes)]
    ended = [child.wait() for child in children]
    assert {code for code, _ in ended} == {0} and len({said for _, said in ended}) == 1
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1
