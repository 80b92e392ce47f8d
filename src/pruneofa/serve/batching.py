"""One queue of token sequences for all requests, and the two threads that fill and empty it.

First in, first out, by slices: a request is tokenized a slice of inputs at a time, and has its next slice tokenized,
behind what has come since, when its last one is taken. Where inputs are read in windows, a slice is fewer of them, and
a request that has had a slice of windows computed goes behind what has come since, too. So a long request delays a
short one by a slice at most, and what waits is bounded by the inputs that are accepted and by MAX_WINDOWS for each
request. Either thread tokenizes. When sequences wait and nobody computes,
it computes, until none is left, while the other thread tokenizes on: a request that comes alone changes threads once.
Sequences are not padded: a batch costs the sum of its tokens. The event loop only waits.
"""

import asyncio
import contextlib
import itertools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine.tokenizer import MAX_WINDOWS, Side, Tokens
from pruneofa.errors import InputError
from pruneofa.progress import notice
from pruneofa.serve.model import Item, Model
from pruneofa.serve.refusal import Refused, invalid

SLICE = 32  # inputs of a request that wait to be computed at a time, and sequences that are taken in a turn


@dataclass(eq=False)
class Job:
    """The inputs of one request, on their way through both threads.

    Attributes:
        model: what computes them.
        items: the inputs.
        names: what the request calls each, for error messages.
        truncate: truncate inputs that are too long.
        side: the end at which they are truncated.
        prompt: text before each; None: the model's own.
        whole: return all hidden states instead of one vector.
        finish: makes `value` of the job; called by the thread that computed last, where NumPy's code is in the caches.
        sequences: the token sequences of the inputs so far, in order.
        results: the array of each sequence, once it is computed.
        value: what `finish` returned.
        tokenization: seconds until the inputs were tokenized, waiting included.
        queue: seconds that each sequence waited, summed.
        inference: seconds of the batches that each sequence was in, summed.
    """

    model: Model
    items: Sequence[Item]
    names: Sequence[str]
    truncate: bool = True
    side: Side | None = None
    prompt: str | None = None
    whole: bool = False
    finish: "Callable[[Job], Any]" = lambda job: None
    sequences: list[Tokens] = field(default_factory=list)
    results: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    value: Any = None
    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    _begin: float = field(default_factory=time.perf_counter)
    _tokenized: int = 0  # inputs
    _next: int = 0  # inputs, with those of the slice that is being tokenized
    _ready: float = 0.0  # when the last slice was tokenized
    _pending: list[int] = field(default_factory=list)  # sequences that wait to be computed, long ones first
    _turn: int = 0  # sequences that were taken since it came to the end of the queue
    _cancelled: bool = False
    _future: "asyncio.Future[None] | None" = None

    def tokenize_slice(self) -> list[Tokens]:
        """The sequences of the next inputs: SLICE of them, or as many as take about so many windows.

        Raises Refused if an input cannot be tokenized, or the windows of all are too many.
        """
        windows = itertools.accumulate(
            self.model.windows_of([item]) for item in self.items[self._tokenized : self._tokenized + SLICE]
        )
        self._next = self._tokenized + max(1, sum(1 for together in windows if together <= SLICE))
        part = slice(self._tokenized, self._next)
        found = self.model.tokenize(
            self.items[part], self.names[part], truncate=self.truncate, side=self.side, prompt=self.prompt
        )
        if (count := len(self.sequences) + len(found)) > max(MAX_WINDOWS, len(self.items)):
            raise invalid(
                f"{self.names[0]} to {self.names[self._next - 1]} take {count} windows together, wanted at most "
                f"{MAX_WINDOWS}; divide the request",
                "tokenization",
            )
        # Windows name their input within the slice.
        return [replace(sequence, text=sequence.text + part.start) for sequence in found] if part.start else found

    def add_slice(self, found: list[Tokens]) -> None:
        """Let the sequences of the next inputs wait to be computed."""
        begin = len(self.sequences)
        self.sequences += found
        self._ready = time.perf_counter()
        self.tokenization = self._ready - self._begin
        # Sequences of similar length together fill the vector lanes.
        order = sorted(range(begin, len(self.sequences)), key=lambda index: -len(self.sequences[index].ids))
        self._pending = order + self._pending
        self._turn = 0
        self._tokenized = self._next  # last: `complete` reads it first

    def cancel(self, error: Exception) -> None:
        """Raise `error` where the job is awaited, and drop what was not computed yet; by the event loop only."""
        self._cancelled = True
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)

    @property
    def tokenized(self) -> bool:
        """Whether all inputs are."""
        return self._tokenized == len(self.items)

    @property
    def complete(self) -> bool:
        """Whether all sequences are computed."""
        return self.tokenized and len(self.results) == len(self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence.ids) for sequence in self.sequences)


class Batcher:
    """The queue and its threads; `acquire`, `release` and `run` are called from one event loop.

    Attributes:
        in_flight: inputs that were accepted and not yet answered.
        limit: how many may be.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_concurrent_requests: int,
        observe: Callable[[int, int], None] = lambda sequences, tokens: None,
        queued: Callable[[int], None] = lambda sequences: None,
    ) -> None:
        """Start both threads; `report` tells `observe` sequences and tokens of every batch, `queued` what waits."""
        self._max_tokens, self.limit = max_batch_tokens, max_concurrent_requests
        self._observe, self._queued = observe, queued
        self.in_flight = 0
        self._computed: deque[tuple[int, int]] = deque()  # batches that `observe` was not told of
        self._untokenized: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()  # of what waits, and of who computes
        self._computing = False
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"worker-{index}", daemon=True) for index in (0, 1)]
        for thread in self._threads:
            thread.start()

    @property
    def healthy(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Sequences that wait to be computed."""
        with self._lock:
            return sum(len(job._pending) for job in self._waiting)

    def acquire(self, inputs: int) -> None:
        """Accept inputs, which are in flight until `release`. Raises Refused if too many are already."""
        if self.in_flight + inputs > self.limit:
            raise Refused("Overloaded", "Model is overloaded")
        self.in_flight += inputs

    def release(self, inputs: int) -> None:
        """Inputs are answered."""
        self.in_flight -= inputs

    async def run(self, job: Job) -> None:
        """Compute a job; when this is cancelled, what was not computed yet is dropped.

        Raises:
            Refused: an input cannot be tokenized, or the engine failed.
        """
        loop = asyncio.get_running_loop()
        try:
            job._future = loop.create_future()
            self._untokenized.put(job)
            await job._future
        finally:
            job._cancelled = True
            if not loop.is_closed():
                loop.call_soon(self.report)

    def close(self) -> None:
        """Stop both threads; what still waits is dropped."""
        self._closed = True
        for _ in self._threads:
            self._untokenized.put(None)
        for thread in self._threads:
            thread.join()

    def report(self) -> None:
        """Tell of batches since the last call, and of what waits; by the event loop only. Called after each job too."""
        while self._computed:
            self._observe(*self._computed.popleft())
        self._queued(self.waiting)

    def _work(self) -> None:
        while (job := self._untokenized.get()) is not None:
            if job._cancelled or self._closed:
                continue
            try:
                found = job.tokenize_slice()
            except Exception as error:
                _fail(job, error)
                continue
            with self._lock:
                job.add_slice(found)
                self._waiting.append(job)
                mine = not self._computing
                self._computing = True
            if mine:
                self._compute()

    def _compute(self) -> None:
        """Compute what waits, until nothing does."""
        while True:
            with self._lock:
                batch = [] if self._closed else next_batch(self._waiting, self._max_tokens)
                if not batch:
                    self._computing = False
                    return
                emptied = [job for job in dict.fromkeys(job for job, _ in batch) if not job._pending]
            for job in emptied:
                if not job.tokenized:
                    self._untokenized.put(job)
            begin = time.perf_counter()
            self._computed.append((len(batch), sum(len(job.sequences[index].ids) for job, index in batch)))
            found = _results(batch)
            seconds = time.perf_counter() - begin
            failed: dict[Job, Exception] = {}
            for (job, index), result in zip(batch, found, strict=True):
                if isinstance(result, Exception):
                    failed[job] = result
                    continue
                job.results[index] = result
                job.queue += max(0.0, begin - job._ready)
                job.inference += seconds
            for job, error in failed.items():
                _fail(job, error)
            _finish({job for job, _ in batch if job.complete})


def next_batch(waiting: deque[Job], most: int) -> list[tuple[Job, int]]:
    """Take the next sequences to compute together, at most `most` tokens, first come, first served.

    All are of the model of the job that waited longest. Jobs that were cancelled, and those whose sequences are all
    taken, leave the queue; one that has had SLICE sequences taken in its turn goes to the end.

    Returns:
        Pairs of a job and the index of its sequence; none if nothing waits.
    """
    jobs = [job for job in waiting if job._pending and not job._cancelled]
    batch: list[tuple[Job, int]] = []
    tokens = 0
    for job in jobs:
        if job.model is not jobs[0].model:
            continue
        while job._pending and job._turn < SLICE:
            length = len(job.sequences[job._pending[-1]].ids)
            if batch and tokens + length > most:
                break
            batch.append((job, job._pending.pop()))
            job._turn += 1
            tokens += length
        if job._pending and job._turn < SLICE:
            break
    left = [job for job in jobs if job._pending]
    waiting.clear()
    waiting.extend(job for job in left if job._turn < SLICE)
    for job in left:
        if job._turn == SLICE:
            job._turn = 0
            waiting.append(job)
    return batch


def _results(batch: Sequence[tuple[Job, int]]) -> list[NDArray[np.float32] | Exception]:
    """The array of each sequence, or why there is none.

    What cannot be computed fails its own job only: the jobs of a batch that fails are computed one by one.
    """
    try:
        sequences, whole = [job.sequences[index] for job, index in batch], [job.whole for job, _ in batch]
        return list(batch[0][0].model.compute(sequences, whole))
    except Exception as error:
        parts = [list(part) for _, part in itertools.groupby(batch, key=lambda pair: pair[0])]
        if len(parts) == 1:
            return [error] * len(batch)
    return [result for part in parts for result in _results(part)]


def _finish(jobs: Collection[Job]) -> None:
    """Answer jobs that are computed."""
    finished = []
    for job in jobs:
        try:
            job.value = job.finish(job)
        except Exception as error:
            _fail(job, error)
        else:
            finished.append(job)
    _resolve(finished, None)


def _fail(job: Job, error: Exception) -> None:
    """Answer a job with an error; that of the engine is written to stderr and not sent."""
    if not isinstance(error, Refused):
        if isinstance(error, InputError):  # such as a result that is infinite
            notice(f"pruneofa: error: {job.model.name}: {error}")
        else:
            traceback.print_exception(error)
        error = Refused("Backend", "Backend error: inference failed", cause="inference")
    job._cancelled = True
    _resolve([job], error)


def _resolve(jobs: Collection[Job], error: Refused | None) -> None:
    """Wake the requests of jobs; their event loop may be gone."""
    futures = [job._future for job in jobs if job._future is not None]

    def wake() -> None:
        for future in futures:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    if futures:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            futures[0].get_loop().call_soon_threadsafe(wake)
