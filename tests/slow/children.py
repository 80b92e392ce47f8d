"""Every verb that writes, run in a forked child, so that a kill or a fault costs no imports.

PRUNEOFA_FAULTS is the number of kills, and of injected faults of each kind, over all verbs (default 100).
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from pruneofa.formats.files import file_fingerprint

COUNT = int(os.environ.get("PRUNEOFA_FAULTS", "100"))
HANGS = 3600  # seconds, on a machine that others use
TEXT = ["--corpus.source", "text.jsonl", "--corpus.max_length", "32", "--corpus.validation", "0.2"]
STEPS = ["--teacher.steps", "6", "--teacher.batch", "8", "--teacher.lr", "1e-3", "--teacher.save_steps", "2",
         "--prune.steps", "12", "--prune.batch", "8", "--prune.lr", "1e-3", "--prune.save_steps", "2"]  # fmt: skip
TASK = ["--data", "task.csv", "--validation", "validation.csv", "--text", "sentence", "--label", "verdict",
        "--batch", "16", "--max-length", "32", "--precision", "fp32"]  # fmt: skip
SCHEDULE = ["--prune.end", "6", "--prune.stop", "9", "--prune.interval", "1"]
ROWS = ["--text", "sentence", "--rows", "16", "--threads", "1"]
VERBS = {
    "prune": ["prune", "model", "OUT", *TEXT, "--precision", "fp32", *STEPS, *SCHEDULE],
    "transfer": ["transfer", "sparse", "OUT", *TASK, "--epochs", "2", "--lr", "1e-3"],
    "quantize": ["quantize", "transfer", "OUT", *TASK, "--qat_epochs", "2", "--teacher", "transfer"],
    "pack": ["pack", "transfer", "OUT", "--compress"],
    "unpack": ["unpack", "pack", "OUT"],
    "export": ["export", "quantize", "OUT", "--to", "compressed-tensors"],
    "predict": ["predict", "pack", "task.csv", "validation.csv", "--out", "OUT", *ROWS],
    "predict-folder": ["predict", "pack", "task.csv", "validation.csv", "--out", "OUT", *ROWS, "--processes", "2"],
}
ONE_FILE = {"predict": "out.csv"}  # the verbs whose OUT is a file
QUICK_FIRST = list(reversed(VERBS))
TRAINING = ("prune", "transfer", "quantize")
VOLATILE = {"stage.json", "evaluation.json", "log.jsonl", "export.json"}  # they hold times


class Child:
    """A verb in a forked process, which ends with the verb; `prepare` is called in it before."""

    def __init__(self, arguments, prepare=lambda: None):
        descriptor, log = tempfile.mkstemp(prefix="pruneofa-faults-")
        self.log = Path(log)
        self.process = os.fork()
        if self.process == 0:
            code = 99
            try:
                os.setpgid(0, 0)
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

        os.close(descriptor)

    def wait(self, seconds=None):
        """(exit code, output); after `seconds` it is killed. A traceback is a failure."""
        until = time.monotonic() + (HANGS if seconds is None else seconds)
        while (ended := os.waitpid(self.process, os.WNOHANG))[0] == 0:
            if late := time.monotonic() > until:
                os.kill(self.process, signal.SIGKILL)
            assert not late or seconds is not None, f"hangs: {self.log.read_text(errors='replace')}"
            time.sleep(0.002)
        said = self.log.read_text(errors="replace")
        self.log.unlink()
        assert "Traceback" not in said, said
        return os.waitstatus_to_exitcode(ended[1]), said


def command(verb, out):
    return [str(out) if word == "OUT" else word for word in VERBS[verb]]


def own_cache(folder):
    """Called in a child: its cache is in `folder`, empty at first, and meets what the folder meets."""
    os.environ["PRUNEOFA_CACHE"] = str(folder / "cache")


def out_of(verb, folder):
    return folder / ONE_FILE.get(verb, "out")


def contents(path):
    """The bytes of a file, or of every file of a folder that holds the result, by their hash; None if there is none."""
    if path.is_file():
        return {"": file_fingerprint(path)}
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in VOLATILE)
    return {str(file.relative_to(path)): file_fingerprint(file) for file in files}


def whole_or_absent(verb, out, straight):
    found = contents(out)
    for name in ("metrics.json", "metric_rows.npz"):  # trained, and not evaluated yet, or not to the end
        if found is not None and name in straight[verb][0] and name not in found:
            found[name] = straight[verb][0][name]
    assert found in (None, straight[verb][0])


def finished(verb, out, straight):
    """The same command ends with the same bytes, and leaves nothing beside them."""
    code, said = Child(command(verb, out), lambda: own_cache(out.parent)).wait()
    if verb not in TRAINING and code == 2:
        assert "exists" in said.splitlines()[-1]  # it was complete already
    else:
        assert code == 0, said
    assert contents(out) == straight[verb][0]
    beside = {path.name for path in out.parent.iterdir()}
    assert beside <= {out.name, "out-teacher", "cache", "mine.old", ".out.tmp"}, beside
    for name in ("mine.old", ".out.tmp"):
        assert (out.parent / name / "mine").read_text() == "mine"


def user_files(folder):
    """Files that a careless clean-up would take for its own."""
    folder.mkdir()
    for name in ("mine.old", ".out.tmp"):
        (folder / name).mkdir()
        (folder / name / "mine").write_text("mine")
    return folder


def record(**figures):
    """One line of JSON on stdout; pytest -s shows it."""
    sys.stdout.write("\n" + json.dumps(figures) + "\n")
    sys.stdout.flush()
