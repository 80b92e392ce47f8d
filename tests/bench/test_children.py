"""Ctrl-C in a benchmark, and SIGTERM (benchmarks/children.py)."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import subprocess, sys, children
def main():
    child = children.start([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"], stdout=-1)
    print(child.stdout.readline(), end="", flush=True)
    child.wait()
children.run(main)
"""


@pytest.mark.parametrize(
    ("sent", "message", "code"), [(signal.SIGINT, "-c: interrupted\n", 130), (signal.SIGTERM, "", 143)]
)
def test_a_signal_ends_the_children(sent: signal.Signals, message: str, code: int) -> None:
    command = [sys.executable, "-c", PROGRAM]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=BENCHMARKS, stdout=pipe, stderr=pipe, text=True) as benchmark:
        assert benchmark.stdout is not None and benchmark.stdout.readline() == "ready\n"
        benchmark.send_signal(sent)
        # Both pipes end only when the child, which has inherited one of them, has ended too.
        assert benchmark.communicate(timeout=30) == ("", message)
    assert benchmark.returncode == code
