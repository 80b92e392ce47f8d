"""The process of a server: its socket, its workers, its signals."""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from pruneofa.errors import InputError
from pruneofa.serve import metrics
from pruneofa.serve.app import create_app
from pruneofa.serve.model import Model, load
from pruneofa.serve.settings import Settings

_FAILED_START = 3  # exits of workers before they are ready, in a row, after which the server gives up


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address, not yet listening: clients are refused until a model is ready.

    Raises InputError if the address is in use or not ours.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot listen on {host}, port {port}: {reason}; give another --host or --port") from None
    bound.set_inheritable(True)
    return bound


def serve(
    models: Sequence[tuple[str, str]],
    settings: Settings,
    *,
    host: str,
    port: int,
    workers: int = 1,
    grace: int = 30,
    engine: dict[str, Any] | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> int:
    """Serve until SIGTERM or SIGINT, and then until the requests that were accepted are answered.

    Args:
        models: the name and the folder or hub id of each.
        settings: limits.
        host: address to listen on.
        port: port to listen on; 0: any that is free.
        workers: processes, each of which loads the models.
        grace: seconds for open requests after SIGTERM.
        engine: arguments of `Engine.from_pretrained`.
        ready: called with the server's URL once a process can answer.

    Returns:
        The exit code.

    Raises:
        InputError: a model cannot be loaded, or the address is taken.
    """
    bound = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{bound.getsockname()[1]}"

    def work() -> None:
        loaded = [load(name, path, **(engine or {})) for name, path in models]
        _run(loaded, settings, bound, grace, lambda: ready(url))

    if workers == 1:
        work()
        return 0
    with tempfile.TemporaryDirectory(prefix="pruneofa-metrics-") as folder:
        os.environ[metrics.DIRECTORY] = folder
        return _prefork(work, workers, Path(folder))


def _run(models: list[Model], settings: Settings, bound: socket.socket, grace: int, ready: Callable[[], None]) -> None:
    config = uvicorn.Config(
        create_app(models, settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
        ws="none",
    )
    server = uvicorn.Server(config)
    startup = server.startup

    async def startup_and_say(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets=sockets)
        ready()

    server.startup = startup_and_say  # type: ignore[method-assign]  # uvicorn has no hook for it
    server.run(sockets=[bound])


def _prefork(work: Callable[[], None], workers: int, shared: Path) -> int:
    """Keep so many processes running `work`; nothing that has threads was loaded before they are forked."""
    stopping = False
    running: dict[int, float] = {}  # process id: when it started

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for process in running:
            os.kill(process, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    failures = 0
    while True:
        while not stopping and len(running) < workers:
            running[_fork(work)] = time.monotonic()
        if not running:
            return 0
        process, status = os.wait()
        started = running.pop(process, 0.0)
        (shared / f"gauge_livesum_{process}.db").unlink(missing_ok=True)  # a dead process has no queue
        code = os.waitstatus_to_exitcode(status)
        if stopping:
            continue
        if code == 2:  # wrong input: it said so, and the others will too
            stop()
            _wait_for(running)
            return code
        failures = failures + 1 if time.monotonic() - started < 1 else 0
        if failures >= _FAILED_START:
            sys.stderr.write("pruneofa: workers end as soon as they start; giving up\n")
            stop()
            _wait_for(running)
            return 3
        sys.stderr.write(f"pruneofa: worker {process} ended with {code}; starting another\n")


def _wait_for(running: dict[int, float]) -> None:
    while running:
        running.pop(os.wait()[0], None)


def _fork(work: Callable[[], None]) -> int:
    """The id of a new process that does `work` and ends."""
    process = os.fork()
    if process:
        return process
    code = 3
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work()
        code = 0
    except InputError as error:
        sys.stderr.write(f"pruneofa: error: {error}\n")
        code = 2
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 3
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
