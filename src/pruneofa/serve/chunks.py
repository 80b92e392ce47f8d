"""Chunks of rows, computed in this process or in several; each becomes a part, a file that is written atomically."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from pruneofa.errors import InputError
from pruneofa.formats.files import new_file
from pruneofa.serve.predictor import Predictor
from pruneofa.serve.tables import Rows


class Chunk(NamedTuple):
    """Rows of one file, as `tables.chunks` reads them.

    Attributes:
        path: the file, whose columns are `columns`.
        file: its number.
        start: number of the first row, from 0.
        rows: the rows.
        header: the columns of the output, without results.
        suffix: the format of the part.
    """

    path: Path
    file: int
    start: int
    rows: Any
    columns: Sequence[str]
    header: Sequence[str]
    suffix: str


class Part(NamedTuple):
    """A part that is complete, and what its name says: the number of its file, its first row, and counts of rows."""

    path: Path
    file: int
    start: int
    rows: int
    skipped: int

    @classmethod
    def at(cls, path: Path) -> "Part":
        """The part that `write` has written to `path`."""
        return cls(path, *map(int, path.stem.split("-")))


def find_parts(work: Path) -> list[Part]:
    """The parts in a folder, in the order of their rows."""
    return [Part.at(path) for path in sorted(work.glob("[0-9]*-*-*-*"))]


class Job(NamedTuple):
    """What a process needs: the arguments of `Predictor`, what `tables.describe` says of every file, and the folder."""

    settings: Mapping[str, Any]
    tables: Mapping[Path, tuple[Sequence[str], int]]
    work: Path


def load(job: Job) -> Predictor:
    """The model. Raises InputError if a file lacks a column, or has one of results already, before any is read."""
    predictor = Predictor(**job.settings)
    for path, (columns, count) in job.tables.items():
        predictor.check_added(columns, str(path))
        if count:  # without rows it may lack the columns
            predictor.columns(columns, str(path))
    return predictor


def write(predictor: Predictor, chunk: Chunk, work: Path) -> Part:
    """Predict a chunk and write its part; returns the part. Raises InputError for a row that is wrong."""
    rows = Rows(chunk.rows, chunk.path, chunk.start, chunk.columns)
    results: list[dict[str, Any] | None] = []
    if rows.names:
        columns = predictor.columns(chunk.columns, str(chunk.path))
        results = predictor.results([rows.column(name) for name in columns], rows.names)
    skipped = sum(result is None for result in results)
    part = work / f"{chunk.file:06}-{chunk.start:012}-{len(results)}-{skipped}{chunk.suffix}"
    with new_file(part) as temporary:
        rows.write(temporary, chunk.suffix, chunk.header, predictor, results)
    return Part.at(part)


def compute(job: Job, chunks: Iterable[Chunk], processes: int) -> Iterator[Part]:
    """Yield the part of every chunk as soon as it is written.

    A process that is killed is replaced, and its chunk computed again.

    Raises:
        InputError: a row is wrong, or the same chunk ended two processes.
    """
    if processes == 1:
        predictor = load(job)
        yield from (write(predictor, chunk, job.work) for chunk in chunks)
        return
    source = iter(chunks)
    workers: list[_Worker] = []
    try:
        for chunk in source:
            workers.append(_Worker(job, chunk))
            if len(workers) == processes:
                break
        while workers:
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                part = worker.receive()
                if part is None:
                    continue
                yield part
                chunk = next(source, None)
                if chunk is None:
                    workers.remove(worker)
                    worker.end()
                else:
                    worker.give(chunk)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process with a model of its own, which has one chunk at a time."""

    def __init__(self, job: Job, chunk: Chunk) -> None:
        self._job = job
        self._start()
        self.give(chunk)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads of native code that hold locks
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_worker, args=(theirs, self._job), daemon=True)
        self._process.start()
        theirs.close()  # now the process alone holds its end: if either of us ends, the other reads the end of the pipe

    def give(self, chunk: Chunk) -> None:
        self._chunk, self._ended = chunk, 0
        self._send()

    def _send(self) -> None:
        with contextlib.suppress(ConnectionError):  # it has ended; `receive` finds why
            self.connection.send(self._chunk)

    def receive(self) -> Part | None:
        """The part that was written; None if the process ended and another has its chunk now."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)  # it is ending, and its own exit code says why
            self.end()
            self._ended += 1
            chunk = self._chunk
            if self._ended == 2:
                code = self._process.exitcode or 0
                at = f"{chunk.path}: two processes"
                if code >= 0:  # such as a script that starts itself again in every process
                    raise InputError(
                        f"{at} ended by themselves at row {chunk.start + 1} (exit code {code}); a program that calls "
                        'predict_files needs: if __name__ == "__main__":'
                    ) from None
                raise InputError(
                    f"{at} were killed at row {chunk.start + 1} and those after it (signal {-code}); if memory was "
                    "short, give fewer --processes or --rows"
                ) from None
            self._start()
            self._send()
            return None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _worker(connection: Connection, job: Job) -> None:
    """The life of a process: load, then a part for every chunk, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which then ends the others
    os.environ.setdefault("RAYON_NUM_THREADS", str(job.settings["threads"]))  # of the tokenizer
    try:
        predictor = load(job)
        while True:
            connection.send(write(predictor, connection.recv(), job.work))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        with contextlib.suppress(ConnectionError):  # the first process was killed, and another has the parts now
            connection.send(error)
