"""The programs in benchmarks/ count what they say they count, and fail where a check of theirs does."""

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str, needs: str = "numpy") -> ModuleType:
        pytest.importorskip(needs)
        return importlib.import_module(name)

    yield load
    for name in {file.stem for file in BENCHMARKS.glob("*.py")} & sys.modules.keys():
        del sys.modules[name]


class SlowConnection:
    """Answers rightly, but only after 0.3 s."""

    def __init__(self, port: int) -> None:
        del port

    async def send(self, path: str, body: bytes) -> None:
        self._inputs = json.loads(body).get("inputs")

    async def receive(self) -> tuple[int, bytes]:
        await asyncio.sleep(0.3)
        if not isinstance(self._inputs, list) or not self._inputs:
            return 422, b""
        return 200, json.dumps([[1.0, 0.0]] * len(self._inputs)).encode()

    def leave(self) -> None:
        pass


def test_the_rate_of_answers_counts_the_seconds_until_the_last_one(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_load = program("serve_load")
    monkeypatch.setattr(serve_load, "Connection", SlowConnection)
    monkeypatch.setattr(serve_load, "resident", lambda process: 1.0)
    engine = SimpleNamespace(predict=lambda texts: np.array([[2.0, 0.0]] * len(texts)))
    began = time.perf_counter()
    found = asyncio.run(serve_load.saturate(0, engine, 0.1, 16, 0))
    took = time.perf_counter() - began
    assert found["seconds until the last answer"] >= 0.3
    assert found["counts"]["texts"] / took <= found["texts per second"] <= found["counts"]["texts"] / 0.29


@pytest.mark.parametrize(
    ("counts", "code", "failed"),
    [
        ({"right": 5, "status 429": 2, "bad request, 422": 1}, 0, []),
        ({"right": 5, "WRONG": 1}, 0, ["1 WRONG"]),
        ({"bad request, 200": 2}, -15, ["2 bad request, 200", "exit code -15 after SIGTERM"]),
    ],
)
def test_a_wrong_answer_is_a_failure(program: Any, counts: dict[str, int], code: int, failed: list[str]) -> None:
    found = {"saturation": {"counts": counts}, "exit code after SIGTERM": code}
    assert program("serve_load").failures(found) == failed


def test_a_turn_lasts_until_enough_requests_are_answered(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = program("peer_loads", "uvloop")

    async def answer(*_: object) -> tuple[int, bytes]:
        await asyncio.sleep(0.001)
        return 200, b""

    monkeypatch.setattr(loads, "answer", answer)
    server = loads.Server("x", None, 0, {("sst2", 32): [(b"", [0])]})
    turn, _ = asyncio.run(loads.closed_loop(server, ("sst2", 32), 2, 0.0, 30))
    assert 30 <= turn["requests"] <= 31 and turn["texts"] == 32 * turn["requests"]


def test_the_open_loop_is_offered_what_is_answered_to_several_clients(program: Any) -> None:
    assert program("serve_peers", "uvloop").overlapping(["1x1", "4x1", "8x1", "32x1", "8x32"]) == ["8x1", "32x1"]


def test_a_step_that_begins_at_another_loss_is_found(program: Any) -> None:
    far = program("qat_step", "torch").far_from_the_first
    assert far({"transfer": 2.0, "static": 2.001, "tensor": 1.9, "dynamic": float("nan")}) == ["tensor", "dynamic"]


def test_a_wrong_product_ends_the_program(program: Any) -> None:
    products = program("sparse_products", "torch")
    wanted = importlib.import_module("torch").ones(2, 3)
    products.check("output", wanted.numpy(), wanted)
    with pytest.raises(SystemExit, match="output is wrong by up to 1; its largest value is 1"):
        products.check("output", 2 * wanted, wanted)


def test_the_package_of_another_checkout_is_refused(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = program("structure")
    monkeypatch.setattr(structure, "interpreter", lambda checkout: sys.executable)
    monkeypatch.setattr(structure, "IMPORTS", 1)
    with pytest.raises(SystemExit, match="was loaded instead"):
        structure._import_time(BENCHMARKS / "records")
