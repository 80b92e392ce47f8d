"""Measure `pruneofa serve`: the time it adds to the engine's own, and what it does under twice the load it can take.

    python benchmarks/serve_load.py MODEL --seconds 60 --record records/DATE-serve/load.json

MODEL is a folder of an embedding model. Part 1, closed loop, one client on one connection: every request is followed by
`Engine.predict` of the same text in this process, so that both see the same machine. The client is a plain socket: an
event loop of its own would be counted as the server's time. Part 2, saturation: as many
connections as it takes for the inputs in flight to be twice --max-concurrent-requests, with requests of 1 to 32 texts;
1 % of them are wrong and 2 % of the clients leave without waiting. Every vector is compared with the engine's. Exit
code 1 if one differs, if a wrong request is answered with 200, or if the server does not end with 0.
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import children
import numpy as np

from pruneofa.engine.engine import Engine
from pruneofa.engine.hardware import processor

WORDS = "the film was a long story about people who live by the river and had never seen the sea before it came to them"


def text(source: random.Random, low: int, high: int) -> str:
    """A text of so many words."""
    return " ".join(source.choice(WORDS.split()) for _ in range(source.randint(low, high)))


def request(path: str, body: bytes) -> bytes:
    """An HTTP/1.1 request."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def content_length(head: bytes) -> int:
    """Bytes of the body behind a response's head."""
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None
    return int(found[1])


class Connection:
    """One HTTP/1.1 connection, kept open, that reads nothing but what it needs."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, path: str, body: bytes) -> None:
        """Send a request, on a new connection if there is none."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        self._streams[1].write(request(path, body))
        await self._streams[1].drain()

    async def receive(self) -> tuple[int, bytes]:
        """Status and body."""
        assert self._streams is not None
        head = await self._streams[0].readuntil(b"\r\n\r\n")
        body = await self._streams[0].readexactly(content_length(head))
        if b"connection: close" in head:
            self.leave()
        return int(head[9:12]), body

    def leave(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def start(model: str, threads: int, limit: int) -> tuple[subprocess.Popen[str], int, float]:
    """A server, its port, and the seconds until it was ready."""
    command = [sys.executable, "-m", "pruneofa", "serve", model, "--port", "0", "--threads", str(threads)]
    begin = time.perf_counter()
    command += ["--max-concurrent-requests", str(limit), "--no-access-log"]
    server = children.start(command, stderr=subprocess.PIPE)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r" on http://127.0.0.1:(\d+)", line):
            return server, int(found[1]), time.perf_counter() - begin
    raise SystemExit("the server did not start")


def resident(process: int) -> float:
    """Resident memory of a process in MB."""
    pages = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    return int(pages[1]) / 1000 if pages else 0.0


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds; ends the program if there is no value."""
    if not values:
        raise SystemExit(
            "too few requests were answered (part 1 leaves out the first 10 of each length); give more --seconds"
        )
    return {f"p{q}": round(1000 * float(np.percentile(values, q)), 3) for q in (50, 90, 99)}


def unit(rows: np.ndarray) -> np.ndarray:
    """Vectors scaled to length 1."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def processor_seconds(process: int) -> float:
    """What a process has used of the CPUs, which the load of others changes less than the clock."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Socket:
    """One connection, without an event loop."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def post(self, path: str, body: bytes) -> tuple[float, int, bytes]:
        """Seconds from the request's first byte to the response's last, status and body."""
        begin = time.perf_counter()
        self._socket.sendall(request(path, body))
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._read()
        head, _, content = answer.partition(b"\r\n\r\n")
        while len(content) < content_length(head):
            content += self._read()
        return time.perf_counter() - begin, int(head[9:12]), content

    def _read(self) -> bytes:
        found = self._socket.recv(1 << 16)
        if not found:
            raise ConnectionError("the server closed the connection")
        return found


def without_engine(port: int, process: int, seconds: float) -> dict[str, Any]:
    """A request that computes nothing: /decode of two ids."""
    connection = Socket(port)
    served = []
    used = processor_seconds(process)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        took, status, _ = connection.post("/decode", b'{"ids": [7, 8]}')
        assert status == 200
        served.append(took)
    used = 1000 * (processor_seconds(process) - used) / len(served)
    return {"requests": len(served), "server ms": percentiles(served), "server's CPU ms per request": round(used, 3)}


def closed_loop(port: int, engine: Engine, seconds: float) -> dict[str, Any]:
    """The time that the server adds for one client, by the length of the texts."""
    source, connection = random.Random(0), Socket(port)
    result = {}
    for name, low, high in (("short, 5 to 25 words", 5, 25), ("long, 90 to 180 words", 90, 180)):
        served: list[float] = []
        alone: list[float] = []
        end = time.perf_counter() + seconds / 2
        while time.perf_counter() < end:
            words = text(source, low, high)
            body = json.dumps({"inputs": words}).encode()
            took, status, answer = connection.post("/embed", body)
            served.append(took)
            begin = time.perf_counter()
            vector = engine.predict(words)
            alone.append(time.perf_counter() - begin)
            assert status == 200
            np.testing.assert_allclose(json.loads(answer)[0], unit(vector), atol=1e-5)
        served, alone = served[10:], alone[10:]  # the first find no warm caches
        added = [one - other for one, other in zip(served, alone, strict=True)]
        result[name] = {
            "requests": len(served),
            "server ms": percentiles(served),
            "engine ms": percentiles(alone),
            "difference of percentiles ms": {
                key: round(value - percentiles(alone)[key], 3) for key, value in percentiles(served).items()
            },
            "added per request ms": percentiles(added),
        }
    return result


async def saturate(port: int, engine: Engine, seconds: float, limit: int, process: int) -> dict[str, Any]:
    """Twice as many inputs in flight as are allowed, clients that leave, requests that are wrong."""
    source = random.Random(1)
    texts = [text(source, *source.choice(((5, 25), (20, 60), (90, 180)))) for _ in range(400)]
    expected = unit(engine.predict(texts))
    counts: Counter[str] = Counter()
    latencies: list[float] = []
    memory: list[float] = []
    begin = time.perf_counter()
    end = begin + seconds

    async def client(seed: int) -> None:
        own, connection = random.Random(seed), Connection(port)
        while time.perf_counter() < end:
            chosen = [own.randrange(len(texts)) for _ in range(own.randint(1, 32))]
            body: dict[str, Any] = {"inputs": [texts[index] for index in chosen]}
            if wrong := own.random() < 0.01:
                body = own.choice(({"inputs": []}, {"inputs": 3}, {"inputs": "a", "dimensions": 0}, {}))
            sent = time.perf_counter()
            await connection.send("/embed", json.dumps(body).encode())
            if own.random() < 0.02:
                await asyncio.sleep(own.random() * 0.05)
                connection.leave()
                counts["left"] += 1
                continue
            status, answer = await connection.receive()
            if wrong:
                counts[f"bad request, {status}"] += 1
            elif status == 200:
                latencies.append(time.perf_counter() - sent)
                right = np.allclose(json.loads(answer), expected[chosen], atol=1e-5)
                counts["right" if right else "WRONG"] += 1
                counts["texts"] += len(chosen)
            else:
                counts[f"status {status}"] += 1
                await asyncio.sleep(0.05)

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append(resident(process))
            await asyncio.sleep(min(0.5, max(0.0, end - time.perf_counter())))

    clients = 2 * limit // 16
    await asyncio.gather(watch(), *(client(seed) for seed in range(clients)))
    took = time.perf_counter() - begin  # the last answers come after `end`, and count
    warm = memory[len(memory) // 4 :]
    return {
        "clients": clients,
        "seconds": seconds,
        "seconds until the last answer": round(took, 2),
        "counts": dict(sorted(counts.items())),
        "texts per second": round(counts["texts"] / took, 1),
        "accepted ms": percentiles(latencies),
        "memory MB": {"after a quarter": warm[0], "least": min(warm), "most": max(warm), "end": warm[-1]},
    }


def failures(found: dict[str, Any]) -> list[str]:
    """What must not happen, of a whole record."""
    counts = found["saturation"]["counts"]
    wrong = [f"{counts[kind]} {kind}" for kind in ("WRONG", "bad request, 200") if counts.get(kind)]
    code = found["exit code after SIGTERM"]
    return wrong + ([f"exit code {code} after SIGTERM"] if code else [])


def main() -> None:
    """Measure, print, record and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60, help="of each part (default 60)")
    parser.add_argument("--saturate", type=float, metavar="SECONDS", help="of part 2 alone (default --seconds)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the server's engine and the one beside it (default 1)"
    )
    parser.add_argument("--limit", type=int, default=512, help="the server's --max-concurrent-requests (default 512)")
    parser.add_argument("--record", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    engine = Engine.from_pretrained(options.model, threads=options.threads)
    server, port, ready = start(options.model, options.threads, options.limit)
    found: dict[str, Any] = {
        "cpu": processor(),
        "load average": os.getloadavg()[0],
        "threads": options.threads,
        "start to ready s": round(ready, 2),
    }
    try:
        found["/decode, one client"] = without_engine(port, server.pid, options.seconds / 4)
        found["closed loop, one client"] = closed_loop(port, engine, options.seconds)
        saturated = options.seconds if options.saturate is None else options.saturate
        found["saturation"] = asyncio.run(saturate(port, engine, saturated, options.limit, server.pid))
    finally:
        server.terminate()
        found["exit code after SIGTERM"] = server.wait(60)
    print(json.dumps(found, indent=2))
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if wrong := failures(found):
        raise SystemExit(f"failed: {', '.join(wrong)}")


if __name__ == "__main__":
    children.run(main)
