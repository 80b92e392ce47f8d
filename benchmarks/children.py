"""Child processes of benchmarks: they end when the benchmark does, however it ends."""

import atexit
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
