"""Tiny models of every task behind the application, and a server in a process of its own."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tiny import write_folder

# Without the serve extra there is nothing here to test; the header of the run says so.
MISSING = [
    name for name in ("starlette", "uvicorn", "httptools", "orjson", "prometheus_client") if find_spec(name) is None
]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str | None:
    return f"tests/serve: left out, no {', '.join(MISSING)}; pip install '.[serve]'" if MISSING else None


if not MISSING:
    from starlette.testclient import TestClient

    from pruneofa.serve.app import create_app
    from pruneofa.serve.model import Model, load
    from pruneofa.serve.settings import Settings

QUIET = {"access_log": False}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by task, in the order in which they are served."""
    root = tmp_path_factory.mktemp("served")
    entities = {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC"}
    return {
        "vectors": write_folder(root / "vectors", "Model"),
        "topics": write_folder(root / "topics"),
        "ranks": write_folder(root / "ranks", labels=1),
        "entities": write_folder(root / "entities", "ForTokenClassification", labels=4, id2label=entities),
        "answers": write_folder(root / "answers", "ForQuestionAnswering"),
        "words": write_folder(root / "words", "ForMaskedLM"),
    }


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> "dict[str, Model]":
    return {name: load(name, folder, threads=1) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def client(models: "dict[str, Model]") -> "Iterator[TestClient]":
    """All models with the default limits."""
    with TestClient(create_app(list(models.values()), Settings(**QUIET))) as found:
        yield found


class Server:
    """`pruneofa serve` as a program, ready to answer.

    Attributes:
        url: of the server.
        process: the program.
    """

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-m", "pruneofa", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        command.append("--no-access-log")  # nobody reads it
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r" on (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError("".join(self.said))

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start servers, which end with the test."""
    running: list[Server] = []

    def started(*arguments: object, **environment: str) -> Server:
        running.append(Server(*arguments, **environment))
        return running[-1]

    yield started
    for server in running:
        server.__exit__()
