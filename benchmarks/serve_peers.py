"""Measure the /embed throughput of `pruneofa serve` beside infinity and sentence-transformers behind FastAPI.

    python benchmarks/serve_peers.py MODEL --data DATA --work DIR --st PYTHON --infinity PYTHON --record FILE.json

MODEL is a sentence-transformers folder whose weights have zeros, or SHAPE@SPARSITY, such as bert-base@0.9, for random
weights with the tokenizer of --tokenizer. DIR keeps what is made from it: the packed folder, ONNX and OpenVINO files.
The two PYTHONs are interpreters of venvs (`pip install "infinity-emb[server,torch,optimum]"`;
`pip install "sentence-transformers[onnx,openvino]" nncf fastapi uvicorn orjson`). DATA has sst2/, qnli/ and squad/ with
parquet files of the Hugging Face data sets' columns.

All servers stay loaded, all but one are stopped (SIGSTOP), and they take turns in random order. First vectors are
checked. Closed loop: so many clients, each with one connection, send the next request when they have the answer.
A turn lasts until 30 requests are answered too. Saturation is the most texts per second of any number of clients.
Open loop: requests of one text arrive at random (Poisson) at a share of what the server answers to 8 clients or more,
because such arrivals overlap, and at 0.8 of the best peer's; latency counts from the arrival.
The client runs on the same CPUs; its share is in the record. Pin everything with `taskset` where there are more CPUs.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import children
import numpy as np
import peer_server
import uvloop
from peer_loads import LEAST, OURS, Server, Turn, answer, closed_loop, open_loop, take_turn
from peer_server import BACKENDS, INFINITY, PEERS
from serve_load import Connection, resident, start, unit

from pruneofa.engine.engine import Engine
from pruneofa.engine.hardware import processor
from pruneofa.engine.threads import physical_cores

COLUMNS = {"sst2": ("sentence",), "qnli": ("question", "sentence"), "squad": ("context",)}
COMMON = 0.8  # of the best peer's saturation: the arrivals that every server gets
REQUESTS = 30  # least number of a turn: a ratio of turns with a few has no third digit
CLIENTS = 8  # whose requests overlap as those of the open loop do


def read_texts(data: Path, name: str, count: int, tokenizer: Any, longest: int) -> list[str]:
    """Texts of a data set's validation split, drawn at random, of at most `longest` tokens, which no server cuts."""
    import pyarrow.parquet

    columns = COLUMNS[name]
    table = pyarrow.parquet.read_table(data / name / "validation.parquet", columns=list(columns))
    distinct = sorted({text for column in columns for text in table[column].to_pylist() if text.strip()})
    random.Random(0).shuffle(distinct)
    fitting = (text for text in distinct if len(tokenizer.encode(text).ids) <= longest)
    return list(itertools.islice(fitting, count))


def spread(texts: list[str]) -> list[str]:
    """In an order in which any few in a row have the lengths of all, so that a slow server is not dealt others."""
    ranks = sorted(range(len(texts)), key=lambda rank: rank * 0.6180339887 % 1)
    texts = sorted(texts, key=len)
    return [texts[rank] for rank in ranks]


def start_peer(name: str, options: argparse.Namespace) -> Server:
    """Start a peer; its output goes to a file in --work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = options.infinity if name in INFINITY else options.st
    words, variables = peer_server.command(name, python, options.work, port, options.threads, options.batch)
    with (options.work / f"{name}.log").open("wb") as log:
        process = children.start(words, env=os.environ | variables, stdout=log, stderr=log)
    return Server(name, process, port, {})


def wait_ready(server: Server, work: Path) -> None:
    """Wait until a server answers, then stop it until its turn."""
    end = time.perf_counter() + 900
    while uvloop.run(try_once(server)) != 200:
        if server.process.poll() is not None or time.perf_counter() > end:
            raise SystemExit(f"{server.name} did not start: see {work / server.name}.log")
        time.sleep(0.1)
    os.kill(server.process.pid, signal.SIGSTOP)


async def try_once(server: Server) -> int:
    """Status of one request, 0 where nobody listens."""
    try:
        return (await answer(Connection(server.port), server, server.body(["ready?"])))[0]
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0


def check(servers: Sequence[Server], work: Path, texts: list[str], st: str, engine: Engine) -> dict[str, Any]:
    """Least cosines with the float model and with the same files without a server; SystemExit where too low."""
    backends = {name.partition("-")[2] for name in (server.name for server in servers)} & set(BACKENDS) | {"torch"}
    alone = json.loads(peer_server.run(st, "encode", str(work), *sorted(backends), texts=texts))
    vectors = {name: unit(np.array(rows, np.float32)) for name, rows in alone.items()}
    vectors[""] = unit(engine.predict(texts))
    found = {}
    for server in servers:
        os.kill(server.process.pid, signal.SIGCONT)
        bodies = [*(server.body([text]) for text in texts), server.body(texts)]
        answers = [uvloop.run(answer(Connection(server.port), server, body))[1] for body in bodies]
        os.kill(server.process.pid, signal.SIGSTOP)
        single = np.concatenate([server.vectors(content) for content in answers[:-1]])
        backend = server.name.partition("-")[2]
        others = {"the float model": vectors["torch"], "one batch of all": server.vectors(answers[-1])}
        if backend in vectors:
            others["the engine" if server.name == OURS else "the same files alone"] = vectors[backend]
        least = {label: round(float(np.sum(single * rows, axis=1).min()), 6) for label, rows in others.items()}
        megabytes, threads = resident(server.process.pid), len(os.listdir(f"/proc/{server.process.pid}/task"))
        print(f"{server.name:20} {megabytes:6.0f} MB, least cosine of one text with {least}", flush=True)
        kind = OURS if server.name == OURS else "int8" if "int8" in server.name else "fp32"
        if least["the float model"] < LEAST[kind]:
            raise SystemExit(f"{server.name} computes something else")
        if server.name == OURS and np.abs(single - vectors[""]).max() > 1e-5:
            raise SystemExit("the server's vectors differ from the engine's")
        found[server.name] = {"least cosine with": least, "resident MB": megabytes, "threads of the process": threads}
    return found


def compare(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Ours over the best peer of each turn, and the median; rates of each turn by name, higher is better."""
    peers = {name: values for name, values in rates.items() if name != OURS}
    best = max(peers, key=lambda name: statistics.median(peers[name]))
    ratios = [ours / max(values) for ours, *values in zip(rates[OURS], *peers.values(), strict=True)]
    return {
        "best peer": best,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "median ratio": round(statistics.median(ratios), 2),
    }


def middle(turns: list[Turn], key: str) -> float:
    """Median over turns."""
    return statistics.median(turn[key] for turn in turns)


def overlapping(cells: Iterable[str]) -> list[str]:
    """The cells whose clients ask for one text each and are many enough that their requests overlap."""
    return [cell for cell in cells if cell.endswith("x1") and int(cell.split("x")[0]) >= CLIENTS]


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    head = "| texts | clients x texts | texts/s | best peer | its texts/s | ratio of each turn | median | of CPU time |"
    lines = [head, "|---" * 8 + "|"]
    for row in record["closed"]:
        ours, best = (row["turns"][name] for name in (OURS, row["best peer"]))
        cpu = "server's CPU ms per text"
        least = min(middle(turns, cpu) for name, turns in row["turns"].items() if name != OURS)
        lines.append(
            f"| {row['texts']} | {row['cell']} | {middle(ours, 'texts/s'):.1f} | {row['best peer']} "
            f"| {middle(best, 'texts/s'):.1f} | {', '.join(map(str, row['ratios']))} | **{row['median ratio']}** "
            f"| {least / middle(ours, cpu):.2f} |"
        )
    for texts, row in record["saturation"].items():
        lines += ["", f"Saturation, {texts}: **{row['median ratio']}** times the best peer ({row['ratios']})", ""]
        lines += ["| server | texts/s | clients x texts |", "|---|---|---|"]
        lines += [f"| {name} | {rate:.1f} | {row['cells'][name]} |" for name, rate in row["texts/s"].items()]
    if record["open"]:
        lines += ["", "| texts | arrivals | server | offered/s | answered/s | p50 ms | p99 ms |", "|---" * 7 + "|"]
    for row in record["open"]:
        for name, turn in row["servers"].items():
            lines.append(f"| {row['texts']} | {row['arrivals']} | {name} | {turn['offered']} | {turn['texts/s']} "
                         f"| {turn['ms']['p50']} | {turn['ms']['p99']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def measure(servers: list[Server], texts: str, expected: np.ndarray, options: argparse.Namespace, record: Any) -> None:
    """Add one set of texts to the record."""
    random_order = random.Random(0)
    rates: dict[str, dict[str, list[float]]] = {server.name: {} for server in servers}  # by cell, of each turn
    for cell in options.cells:
        clients, size = map(int, cell.split("x"))
        turns: dict[str, list[Turn]] = {server.name: [] for server in servers}
        for _ in range(options.turns):
            for server in random_order.sample(servers, len(servers)):
                load = closed_loop(server, (texts, size), clients, options.seconds, REQUESTS)
                turns[server.name].append(take_turn(server, load, expected))
        for name, found in turns.items():
            rates[name][cell] = [turn["texts/s"] for turn in found]
        row = {"texts": texts, "cell": cell, **compare({name: found[cell] for name, found in rates.items()})}
        record["closed"].append({**row, "turns": turns})
        print(row, {name: statistics.median(found[cell]) for name, found in rates.items()}, flush=True)
    cells = {name: max(found, key=lambda cell: statistics.median(found[cell])) for name, found in rates.items()}
    best = {name: rates[name][cell] for name, cell in cells.items()}
    record["saturation"][texts] = {
        "texts/s": {name: statistics.median(found) for name, found in best.items()},
        "cells": cells,
        **compare(best),
    }
    if not options.open_seconds:
        return
    # What a server can do with requests of one text. One client would overstate it where several are slower.
    alone = {name: max(statistics.median(found[cell]) for cell in overlapping(found)) for name, found in rates.items()}
    common = COMMON * max(rate for name, rate in alone.items() if name != OURS)
    offers = {f"{share} of its own saturation": {name: share * rate for name, rate in alone.items()}
              for share in options.rates}  # fmt: skip
    offers[f"{COMMON} of the best peer's saturation"] = dict.fromkeys(alone, common)
    for label, offered in offers.items():
        found = {}
        for server in random_order.sample(servers, len(servers)):
            load = open_loop(server, (texts, 1), offered[server.name], options.open_seconds)
            found[server.name] = take_turn(server, load, expected)
        record["open"].append({"texts": texts, "arrivals": label, "servers": found})
        print(f"{texts:6} {label}", {name: (turn["texts/s"], turn["ms"]["p99"]) for name, turn in found.items()})


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the files that are made from MODEL")
    parser.add_argument("--st", required=True, metavar="PYTHON", help="that has sentence-transformers")
    parser.add_argument("--infinity", metavar="PYTHON", help="that has infinity-emb")
    parser.add_argument("--tokenizer", type=Path, help="sentence-transformers folder, for random weights")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--texts", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--cells", nargs="+", default=["1x1", "8x1", "32x1", "1x32", "8x32"],
                        metavar="CxN", help="clients x texts per request of the closed loop")  # fmt: skip
    parser.add_argument("--turns", type=int, default=3, help="of each server in each cell (default 3)")
    parser.add_argument("--seconds", type=float, default=2, help="of a turn, at least (default 2)")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 0.8, 1.2], help="shares of saturation")
    parser.add_argument("--open-seconds", type=float, default=5, help="of a turn of the open loop; 0: none (default 5)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="texts of a peer's batch (default 32)")
    parser.add_argument("--count", type=int, default=256, help="texts of each set (default 256)")
    parser.add_argument("--record", type=Path, required=True, help="JSON; the table goes beside it as .md")
    options = parser.parse_args()
    if options.open_seconds and not overlapping(options.cells):
        raise SystemExit(f"--cells: the open loop needs one of at least {CLIENTS} clients with one text, such as 8x1")
    cores = physical_cores(range(os.cpu_count() or 1))
    if "optimum" in {word for name in options.peers for word in INFINITY.get(name, ())} and options.threads != cores:
        raise SystemExit(
            f"--threads is {options.threads}, but infinity computes ONNX files with a thread for each of the "
            f"machine's {cores} cores, whatever it is told: choose --threads {cores}, or --peers without infinity-onnx"
        )
    return options


def prepare(options: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Make the files that the servers load; returns the sets of texts by name, and what the record begins with."""
    from tokenizers import Tokenizer

    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str((options.tokenizer or Path(options.model)) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    sets = {name: read_texts(options.data, name, options.count + 32, tokenizer, 250) for name in options.texts}
    calibration = [text for texts in sets.values() for text in texts[options.count :]]
    sets = {name: spread(texts[: options.count]) for name, texts in sets.items()}
    peer_server.prepare(options.model, options.tokenizer, options.work, options.st, calibration)
    lengths = {name: [len(tokenizer.encode(text).ids) for text in texts] for name, texts in sets.items()}
    record: dict[str, Any] = {
        "model": options.model, "cpu": processor(), "threads": options.threads, "load average": os.getloadavg(),
        "command": sys.argv, "texts": {name: {"mean tokens": statistics.mean(values), "most": max(values)}
                                       for name, values in lengths.items()},
        "closed": [], "saturation": {}, "open": [],
    }  # fmt: skip
    return sets, record


def start_all(options: argparse.Namespace) -> list[Server]:
    """Ours and the peers, ready and stopped."""
    process, port, _ = start(str(options.work / "packed"), options.threads, 4096)
    servers = [Server(OURS, process, port, {}), *(start_peer(name, options) for name in options.peers)]
    for server in servers:
        wait_ready(server, options.work)
    return servers


def warm_up(servers: list[Server], name: str, texts: list[str], expected: np.ndarray, options: Any) -> None:
    """Make the requests of one set of texts, and answer some of each size."""
    sizes = sorted({int(cell.split("x")[1]) for cell in options.cells} | {1})  # texts of a request
    for server, size in itertools.product(servers, sizes):
        parts = [list(range(first, first + size)) for first in range(0, len(texts) - size + 1, size)]
        bodies = [server.body([texts[index] for index in part]) for part in parts]
        server.requests[name, size] = list(zip(bodies, parts, strict=True))
    for server, size in itertools.product(servers, sizes):
        take_turn(server, closed_loop(server, (name, size), 8, options.seconds / 2), expected)


def main() -> None:
    """Prepare, check, measure and record."""
    options = arguments()
    sets, record = prepare(options)
    engine = Engine.from_pretrained(options.work / "packed", threads=options.threads)
    servers = start_all(options)
    some = [text for texts in sets.values() for text in texts[: 32 // len(sets)]]
    record["check"] = check(servers, options.work, some, options.st, engine)
    for name, texts in sets.items():
        expected = unit(engine.predict(texts))
        warm_up(servers, name, texts, expected, options)
        measure(servers, name, expected, options, record)
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.record.with_suffix(".md").write_text(table(record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    children.run(main)
