"""The process of a server: its socket, its workers, its signals."""

import contextlib
import ctypes
import errno
import gc
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import uvicorn

from pruneofa.errors import InputError, NotNow, explained
from pruneofa.formats.hub import FILES
from pruneofa.formats.tensors import weights_folder
from pruneofa.progress import notice
from pruneofa.serve.connections import INTERVAL, Connection, close_stalled
from pruneofa.serve.settings import Settings
from pruneofa.serve.shared import metrics_folder
from pruneofa.serve.tracing import check_extra, traced

_NOT_NOW = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, socket.EAI_AGAIN)  # a network that is not up yet, an old server
_ENDING = (signal.SIGTERM, signal.SIGINT)
_SHARED = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
_BACKLOG = 2048  # connections that wait to be accepted, as uvicorn has it
_LOOK = 0.1  # seconds between two looks for workers that ended, while another waits to be started
_PAUSE = 0.2  # seconds before a worker that ended is replaced
_MOST_PAUSE = 30.0  # where it ends again and again, as with a model that cannot be loaded any more
_SHORT_LIFE = 10.0  # seconds

Work = Callable[[int, bool, Callable[[], Any]], None]  # see _prefork


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address, not yet listening: clients are refused until a model is ready.

    Raises InputError: NotNow if the address is in use or not (yet) ours, or its name cannot be looked up now.
    """
    with _address_errors(host, port):
        family, kind, protocol, _, _ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio sets TCP_NODELAY; without it every answer may wait 40 ms for an ACK.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    bound.set_inheritable(True)
    return bound


@contextlib.contextmanager
def _address_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = "no name of a host" if isinstance(error, UnicodeError) else error.strerror or error
        wrong = NotNow if getattr(error, "errno", None) in _NOT_NOW else InputError
        raise wrong(
            f"cannot listen on {host or 'no host'}, port {port}: {reason}; give another --host or --port"
        ) from None


def _listen_beside(bound: socket.socket, alone: bool) -> socket.socket:
    """A worker's own listening socket on the address of `bound`, which keeps the port and never listens.

    The kernel spreads connections over such sockets. With one socket for all, the first worker that wakes up would take
    all that wait. And what waits for a worker that dies is reset; in a socket of the parent it would wait for ever.

    Args:
        bound: of the parent.
        alone: no other worker listens yet, so whoever does is another server, which is an error.
    """
    own = socket.socket(bound.family, bound.type, bound.proto)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, not alone)
    own.bind(bound.getsockname())
    own.listen(_BACKLOG)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return own


def serve(
    models: Sequence[tuple[str, str]],
    settings: Settings,
    *,
    host: str,
    port: int,
    workers: int = 1,
    grace: int = 30,
    engine: dict[str, Any] | None = None,
    otlp_endpoint: str | None = None,
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
        otlp_endpoint: URL of an OpenTelemetry collector; None: no traces.
        ready: called with the server's URL once a process can answer.

    Returns:
        The exit code.

    Raises:
        InputError: a model cannot be loaded, or the address is taken.
        ImportError: traces are wanted, and the otel extra is not installed.
    """
    if otlp_endpoint is not None:
        check_extra()
    # A connection is a file, and the usual soft limit of 1024 is kept for programs that use select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS does not take its own limit, which is infinite
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    bound = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{bound.getsockname()[1]}"

    # A hub id is looked up once, so that all workers, whenever they start, load the same snapshot.
    folders = [weights_folder(path) for _, path in models]
    begun = [_state(folder) for folder in folders]

    def work(place: int, alone: bool, started: Callable[[], Any]) -> None:
        # Imported by each worker: prometheus_client looks for its shared folder when it is imported.
        from pruneofa.serve.app import create_app
        from pruneofa.serve.metrics import count_in_place
        from pruneofa.serve.model import load

        if workers > 1:
            count_in_place(place)
        loaded = [load(name, folder, **(engine or {})) for (name, _), folder in zip(models, folders, strict=True)]
        for (_, path), folder, state in zip(models, folders, begun, strict=True):
            if workers > 1 and _state(folder) != state:  # the other workers have loaded another model
                raise InputError(f"{path}: changed since the server started; restart it")
        with traced(create_app(loaded, settings), otlp_endpoint) as app:
            with _address_errors(host, port):
                if workers > 1 and sys.platform == "linux":  # other systems do not spread connections
                    listening = _listen_beside(bound, alone)
                else:
                    listening = bound
                    listening.listen(_BACKLOG)
            _run(app, listening, grace, started)

    if workers == 1:
        for name in _SHARED:  # of a program around this one: it may not exist, and has no place for this server
            os.environ.pop(name, None)
        work(0, True, lambda: ready(url))
        return 0
    with metrics_folder() as folder:
        os.environ[_SHARED[0]] = str(folder)
        return _prefork(work, workers, folder, bound, lambda: ready(url))


def _state(folder: Path) -> list[tuple[Any, ...]]:
    """What is different once a file of a model was written or replaced."""
    patterns = (*FILES, "pytorch_model*.bin", "*/config.json")
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return [(file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file in sorted(files) if (stat := file.stat())]


def _run(app: Any, listening: socket.socket, grace: int, started: Callable[[], Any]) -> None:
    waiting: dict[Any, Any] = {}

    async def look_at_connections() -> None:
        nonlocal waiting
        waiting = close_stalled(list(server.server_state.connections), waiting)

    config = uvicorn.Config(
        app,
        http=Connection,
        callback_notify=look_at_connections,
        timeout_notify=INTERVAL,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who calls is who connects
        timeout_graceful_shutdown=grace,
        ws="none",
        timeout_keep_alive=75,  # seconds; clients keep connections in pools, and a short time makes them race
    )
    server = uvicorn.Server(config)
    startup = server.startup

    async def startup_and_say(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets=sockets)
        # What is there now and no garbage stays. To look through it again would stop all requests for up to 100 ms.
        gc.collect()
        gc.freeze()
        started()

    server.startup = startup_and_say  # type: ignore[method-assign]  # uvicorn has no hook for it

    def stop(*_: object) -> None:
        server.should_exit = True

    # Until uvicorn has handlers of its own; it raises a signal that it got again, after it has drained.
    for number in _ENDING:
        signal.signal(number, stop)
    server.run(sockets=[listening])


@dataclass
class _Worker:
    """A process that serves.

    Attributes:
        place: its number, from 0; who replaces it has the same.
        begun: when it started.
        pause: seconds for which that was put off.
        saying: where it says that it is ready: the end of a pipe.
    """

    place: int
    begun: float
    pause: float
    saying: int

    @cached_property
    def ready(self) -> bool:
        """Whether it became ready; waits until it is, or has ended."""
        said = os.read(self.saying, 1)
        os.close(self.saying)
        return said != b""

    def next_pause(self) -> float:
        """Seconds to put off the next one, now that this one has ended: more where it ended soon."""
        return min(2 * self.pause, _MOST_PAUSE) if time.monotonic() - self.begun < _SHORT_LIFE else _PAUSE


def _prefork(
    work: Work,
    workers: int,
    shared: Path,
    bound: socket.socket,
    started: Callable[[], None],
) -> int:
    """Keep so many processes running `work`; nothing that has threads was loaded before they are forked.

    The others start once the first is ready, so that wrong input is said once, and before anything listens.

    Args:
        work: gets its place, whether it is the first of all, and what to call when it is ready.
        workers: number of processes.
        shared: folder of metrics.
        bound: closed at the end, as no more are accepted where the workers share it.
        started: called when the first worker is ready.

    Returns:
        The exit code: that of the first worker where that does not become ready; 3 where no worker runs any more, and
        in no place the last one became ready: another start of the program may help (other files, more memory).
    """
    stopping = False
    running: dict[int, _Worker] = {}  # by process
    loaded: dict[int, bool] = {}  # by place: whether the last one that ended had become ready

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        bound.close()
        for process in running:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and is not removed yet
                os.kill(process, signal.SIGTERM)

    for number in _ENDING:
        signal.signal(number, stop)
    first = _fork(work, True, running, 0, _PAUSE)
    if stopping:  # said after the handlers were there, and before the fork
        stop()
    ready = running[first].ready
    if ready and not stopping:
        started()
    # When to start each, its last pause, and its place.
    missing = [(0.0, _PAUSE, place) for place in range(1, workers)] if ready else []
    while running or (missing and not stopping):
        missing.sort()
        while missing and not stopping and missing[0][0] <= time.monotonic():
            _, pause, place = missing.pop(0)
            _fork(work, False, running, place, pause)
            if stopping:
                stop()
        looking = missing and not stopping  # from time to time, as another is to be started
        process, status = os.waitpid(-1, os.WNOHANG if looking else 0) if running else (0, 0)
        if process not in running:
            time.sleep(_LOOK)
            continue
        worker = running.pop(process)
        (shared / f"gauge_livesum_{worker.place}.db").unlink(missing_ok=True)  # a dead process has no queue
        if not stopping:
            code = os.waitstatus_to_exitcode(status)
            loaded[worker.place] = worker.ready
            if not running and not any(loaded.values()):
                return _give_up(process, code, first)
            notice(f"pruneofa: worker {process} ended with {code}; starting another")
            pause = worker.next_pause()
            missing.append((time.monotonic() + pause, pause, worker.place))
    return 0


def _give_up(process: int, code: int, first: int) -> int:
    """The exit code where a worker ended while it loaded, and no other runs; the first has said why in one line."""
    if process == first:
        return code if code > 0 else 3
    notice(f"pruneofa: error: worker {process} ended with {code} while it loaded, and no other runs; start serve again")
    return 3


def _end_with_parent(parent: int) -> None:
    """Get SIGTERM when the parent dies, so that no worker keeps the port; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before this was asked for
        raise SystemExit(0)


def _fork(
    work: Work,
    alone: bool,
    running: dict[int, _Worker],
    place: int,
    pause: float,
) -> int:
    """Start a process that does `work` and ends, add it to those that `_prefork` ends, and return its number.

    No signal is handled in between: the parent would not pass it on to the new process, which would have taken it for
    its own parent's.
    """
    parent = os.getpid()
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    process = os.fork()
    if process:
        os.close(writing)  # what is read ends with the process
        running[process] = _Worker(place, time.monotonic(), pause, reading)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        return process
    code = 3
    try:
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        _end_with_parent(parent)
        work(place, alone, lambda: os.write(writing, b"1"))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 3
    except BaseException as error:
        if found := explained(error):  # as the program does without workers
            code = found[1]
            notice(f"pruneofa: error: {found[0]}")
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
