"""Child processes of benchmarks: they end when the benchmark does, however it ends."""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def start(command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """Start a process with text pipes; `options` are those of Popen.

    It has a process group of its own: Ctrl-C in a terminal reaches the benchmark only, and what the child has started
    ends with it.
    """
    child = subprocess.Popen([str(part) for part in command], text=True, process_group=0, **options)
    atexit.register(_end, child)
    return child


def start_answering(command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """`start` a process that answers lines of JSON on its standard input with lines of JSON."""
    return start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def answer(child: subprocess.Popen[str]) -> Any:
    """The value of its next line. Raises EOFError if it has ended."""
    assert child.stdout is not None
    if not (line := child.stdout.readline()):
        raise EOFError(f"{child.args} ended without an answer")
    return json.loads(line)


def ask(child: subprocess.Popen[str], question: Any) -> Any:
    """Its answer to one question."""
    assert child.stdin is not None
    child.stdin.write(json.dumps(question) + "\n")
    child.stdin.flush()
    return answer(child)


def dismiss(child: subprocess.Popen[str]) -> None:
    """No more questions: wait until it has ended."""
    assert child.stdin is not None
    child.stdin.close()
    child.wait()


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run(main: Callable[[], int | None]) -> None:
    """Exit with the code that `main` returns; at Ctrl-C with one line and code 130; SIGTERM ends the children too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `atexit` is not called otherwise
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: interrupted\n")
        sys.exit(130)
