"""Servers of embeddings under load: closed and open loop, one server at a time, with its answers compared.

For `serve_peers.py`, which starts them.
"""

import asyncio
import base64
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop
from peer_server import INFINITY
from serve_load import Connection, percentiles, processor_seconds, unit

OURS = "pruneofa"
LEAST = {"fp32": 0.999, "int8": 0.9, OURS: 0.98}  # cosine of a vector with that of the float model

Turn = dict[str, Any]


@dataclass
class Server:
    """A server that runs.

    Attributes:
        requests: bodies of requests and the texts in each, by (name of the texts, texts per request).
    """

    name: str
    process: subprocess.Popen[Any]
    port: int
    requests: dict[tuple[str, int], list[tuple[bytes, list[int]]]]

    @property
    def path(self) -> str:
        """Of the route."""
        return "/embeddings" if self.name in INFINITY else "/embed"

    def body(self, texts: list[str]) -> bytes:
        """Of a request; infinity answers faster in base64."""
        if self.name in INFINITY:
            return json.dumps({"model": "model", "input": texts, "encoding_format": "base64"}).encode()
        return json.dumps({"inputs": texts}).encode()

    def vectors(self, answer: bytes) -> np.ndarray:
        """Of an answer, (texts, hidden), scaled to length 1."""
        rows = json.loads(answer)
        if self.name in INFINITY:
            rows = [np.frombuffer(base64.b64decode(row["embedding"]), np.float32) for row in rows["data"]]
        return unit(np.array(rows, np.float32))


async def answer(connection: Connection, server: Server, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to one request."""
    await connection.send(server.path, body)
    return await connection.receive()


async def closed_loop(
    server: Server, key: tuple[str, int], clients: int, seconds: float, least: int = 0
) -> tuple[Turn, list[Any]]:
    """`clients` connections with one request each in flight, for `seconds` and until `least` requests are answered.

    Ends when the requests begun until then are answered.
    """
    requests = itertools.cycle(server.requests[key])
    latencies: list[float] = []
    last: list[Any] = []
    begin = time.perf_counter()

    async def client() -> None:
        connection = Connection(server.port)
        answered: Any = None
        while (sent := time.perf_counter()) < begin + seconds or len(latencies) < least:
            body, chosen = next(requests)
            status, content = await answer(connection, server, body)
            latencies.append(time.perf_counter() - sent)
            assert status == 200, content[:300]
            answered = content, chosen
        last.append(answered)
        connection.leave()

    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - begin
    return {"requests": len(latencies), "texts": len(latencies) * key[1], "s": took, "ms": percentiles(latencies)}, last


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, in seconds from the begin."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 20)
    times = np.cumsum(gaps)
    return times[times < seconds].tolist()


async def open_loop(server: Server, key: tuple[str, int], rate: float, seconds: float) -> tuple[Turn, list[Any]]:
    """Requests at random times, on as many connections as it takes; ends when all are answered."""
    requests, idle = itertools.cycle(server.requests[key]), [Connection(server.port)]
    latencies: list[float] = []
    last: list[Any] = []
    due = arrivals(rate, seconds, int(1000 * rate))
    begin = time.perf_counter()

    async def request(moment: float, body: bytes, chosen: list[int]) -> None:
        connection = idle.pop() if idle else Connection(server.port)
        status, content = await answer(connection, server, body)
        latencies.append(time.perf_counter() - begin - moment)
        assert status == 200, content[:300]
        idle.append(connection)
        last[:] = [(content, chosen)]

    async with asyncio.TaskGroup() as group:
        for moment in due:
            await asyncio.sleep(max(0, begin + moment - time.perf_counter()))
            group.create_task(request(moment, *next(requests)))
    took = time.perf_counter() - begin
    for connection in idle:
        connection.leave()
    return {"texts": len(due), "s": took, "offered": round(len(due) / seconds, 2), "ms": percentiles(latencies)}, last


def take_turn(server: Server, load: Coroutine[Any, Any, tuple[Turn, list[Any]]], expected: np.ndarray) -> Turn:
    """Let one server run, load it, and compare the last answers with vectors of the same texts."""
    os.kill(server.process.pid, signal.SIGCONT)
    used, own = processor_seconds(server.process.pid), time.process_time()
    turn, last = uvloop.run(load)
    turn["texts/s"] = round(turn["texts"] / turn["s"], 2)
    used = processor_seconds(server.process.pid) - used
    turn["server's CPU ms per text"] = round(1000 * used / turn["texts"], 3)
    turn["client's share of a CPU"] = round((time.process_time() - own) / turn["s"], 3)
    os.kill(server.process.pid, signal.SIGSTOP)
    cosines = [np.sum(server.vectors(content) * expected[chosen], axis=1).min() for content, chosen in last]
    turn["least cosine"] = round(float(min(cosines)), 5)
    # `expected` is int8 too: a peer may differ from it by both errors.
    assert turn["least cosine"] > (LEAST["fp32"] if server.name == OURS else LEAST["int8"] - 0.1), (server.name, turn)
    turn["s"] = round(turn["s"], 3)
    return turn
