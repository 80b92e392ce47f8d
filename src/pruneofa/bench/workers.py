"""Processes of `peers.py`, `peer_files.py` and `one_layer.py`, and the requests to them."""

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class WorkerError(RuntimeError):
    """A peer's process returned an error, or ended."""


class TimeLimitError(WorkerError):
    """A peer's process exceeded the time limit, and was ended."""


class Worker:
    """One process of `peers.py`, or of another program."""

    def __init__(
        self,
        peer: str,
        log: Path,
        environment: Mapping[str, str],
        python: str | None = None,
        limit: float | None = None,
        program: str = "peers",
    ) -> None:
        """Start the process; its output goes to `log`.

        Args:
            python: another interpreter, which need not have pruneofa installed.
            limit: maximum seconds per answer.
            program: the file in this folder to run: "peers", or "peer_files" or "one_layer", which need pruneofa.
        """
        file = Path(__file__).with_name(f"{program}.py")
        run = ["-P", str(file)] if python else ["-m", f"pruneofa.bench.{program}"]
        self.peer, self._log, self._limit = peer, log, limit
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [python or sys.executable, *run],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                text=True,
                start_new_session=True,  # only this process receives Ctrl-C; it then ends the others
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises WorkerError, or TimeLimitError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            # A file descriptor rather than a buffer: one request has one answer, so nothing is left in the buffer.
            if not select.select([self._process.stdout.fileno()], [], [], self._limit)[0]:
                self._process.kill()
                raise TimeLimitError(f"took longer than the {self._limit:g} seconds of --limit to {do}")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()][-1:]
            raise WorkerError(f"its process ended with {self._process.wait()}" + "".join(f": {t[:200]}" for t in last))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
