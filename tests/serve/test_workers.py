"""The workers of a server: they share a port, come back, and end with it."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pruneofa.engine.engine import Engine
from pruneofa.errors import NotNow
from pruneofa.serve.server import _listen_beside, _state, bind
from pruneofa.serve.shared import metrics_folder
from tests.serve.asking import ask, metric


def workers_of(server):
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as file:
        return {int(process) for process in file.read().split()}


def with_workers(start, tmp_path, model, count):
    """A server of which so many workers have loaded the model and listen."""
    server = start(model, "--workers", count, TMPDIR=str(tmp_path))
    end = time.monotonic() + 60
    listening = f"0100007F:{server.address[1]:04X} 00000000:0000 0A "
    while Path("/proc/net/tcp").read_text().count(listening) < count:
        assert time.monotonic() < end
        time.sleep(0.05)
    return server


def refused_within(server, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            server.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass
        time.sleep(0.05)
    return False


def test_workers_share_a_port_and_a_dead_one_comes_back(start, folders, tmp_path):
    server = with_workers(start, tmp_path, folders["vectors"], 2)
    expected = Engine.from_pretrained(folders["vectors"], threads=1).predict("the king")
    first = workers_of(server)
    wrong, failed, stop = [], [], threading.Event()

    def load():
        while not stop.is_set():
            try:
                status, found = ask(server, inputs="the king", normalize=False)
            except OSError:  # the connection of the killed worker
                failed.append(1)
                continue
            if status != 200 or max(abs(found[0] - expected)) > 1e-5:
                wrong.append((status, found))

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()
    time.sleep(0.5)
    counted = metric(server, 'te_request_count{method="single"}')
    os.kill(min(first), signal.SIGKILL)
    end = time.monotonic() + 30
    while len(workers_of(server)) < 2 or workers_of(server) == first:
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)
    stop.set()
    for client in clients:
        client.join()
    assert wrong == [] and len(failed) < 10
    assert len(workers_of(server) & first) == 1
    assert metric(server, 'te_request_count{method="single"}') > counted > 10  # of all workers together, ever
    assert len(list(tmp_path.glob("pruneofa-metrics-*/counter_*.db"))) == 2  # not one more for each that died
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("after", [0, 0.1, 0.3])
def test_sigterm_ends_a_worker_that_is_only_starting(start, folders, after):
    server = start(folders["vectors"], "--workers", 2)  # the second starts when the first is ready
    time.sleep(after)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def test_a_packed_folder_may_go_while_it_is_served(start, folders, tmp_path):
    from pruneofa.formats.pack import pack

    pack(folders["vectors"], tmp_path / "packed")
    expected = Engine.from_pretrained(tmp_path / "packed", threads=1)
    server = start(tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed")
    status, found = ask(server, inputs="the king", normalize=False)
    assert status == 200 and max(abs(found[0] - expected.predict("the king"))) < 1e-5
    with urllib.request.urlopen(f"{server.url}/info", timeout=30) as response:
        engine = json.load(response)["engine"]
    assert engine["precision"] == "int8" and engine["sparsity"] == pytest.approx(expected.sparsity, abs=1e-4)
    assert expected.sparsity == pytest.approx(Engine.from_pretrained(folders["vectors"]).sparsity)


def test_a_worker_does_not_come_back_with_another_model(start, folders, tmp_path):
    shutil.copytree(folders["vectors"], tmp_path / "model")
    server = with_workers(start, tmp_path, tmp_path / "model", 2)
    expected = ask(server, inputs="the king")
    first = workers_of(server)
    weights = tmp_path / "model" / "model.safetensors"
    os.replace(shutil.copy(weights, tmp_path / "other"), weights)
    os.kill(min(first), signal.SIGKILL)
    for line in server.process.stderr:
        if "changed since the server started" in line:
            break
    assert ask(server, inputs="the king") == expected
    os.kill(max(first), signal.SIGKILL)  # now none can come back: a supervisor has to start the program again
    assert server.process.wait(60) == 3
    said = server.process.stderr.read()
    assert "while it loaded, and no other runs" in said and "Traceback" not in said


def test_after_sigterm_connections_are_refused_while_a_request_is_open(start, folders, tmp_path):
    server = with_workers(start, tmp_path, folders["vectors"], 2)
    body = b'{"inputs": "the king"}'
    with server.connect() as held:
        held.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
        time.sleep(0.3)  # accepted
        server.process.send_signal(signal.SIGTERM)
        assert refused_within(server, 5) and server.process.poll() is None
        held.sendall(body)
        assert held.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.process.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not spread connections")
def test_every_worker_has_some_of_many_connections(start, folders, tmp_path):
    server = with_workers(start, tmp_path, folders["vectors"], 3)

    def sockets(worker):
        folder = f"/proc/{worker}/fd"
        return sum(os.readlink(f"{folder}/{file}").startswith("socket:") for file in os.listdir(folder))

    workers = sorted(workers_of(server))
    before = [sockets(worker) for worker in workers]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    connections = [server.connect() for _ in range(60)]
    for worker in workers:  # the first to wake up leaves the others theirs
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.2)
    for connection in connections:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    after = [sockets(worker) for worker in workers]
    found = [now - was for now, was in zip(after, before, strict=True)]
    for connection in connections:
        connection.close()
    assert min(found) >= 4, found  # two may be of its event loop, which it makes after it listens


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not spread connections")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_another_server_is_no_neighbour(host):
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"no {host} here")
    with bind(host, 0) as parent, bind(host, parent.getsockname()[1]) as other:  # which starts at the same time
        with _listen_beside(parent, True), _listen_beside(parent, False):
            with pytest.raises(OSError, match="in use"):
                _listen_beside(other, True)
            with pytest.raises(NotNow, match="in use"):
                bind(host, parent.getsockname()[1])
        with pytest.raises(ConnectionRefusedError):  # nobody listens, though the port is kept
            socket.create_connection(parent.getsockname()[:2], timeout=5)
        _listen_beside(parent, False).close()


def test_every_file_of_a_model_is_watched(folders, tmp_path):
    shutil.copytree(folders["vectors"], tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    states = [_state(tmp_path / "model")]
    for name in ("quantization.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        (tmp_path / "model" / name).write_text("{}")
        states.append(_state(tmp_path / "model"))
    assert all(before != after for before, after in itertools.pairwise(states))


CRASHING = """
import os, pathlib, socket, sys, time
from pruneofa.serve import server
server._PAUSE, server._SHORT_LIFE, server._LOOK = 0.05, 0.5, 0.02
folder = pathlib.Path(sys.argv[1])

def work(place, alone, started):
    with open(folder / "starts", "a") as file:
        file.write("x")
    try:
        held = os.open(folder / "held", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        raise SystemExit(1)  # a worker that ends at once, again and again
    os.write(held, b"%d" % os.getpid())
    started()
    time.sleep(60)

sys.exit(server._prefork(work, 2, folder, socket.socket(), lambda: None))
"""


def test_a_worker_that_ends_again_and_again_delays_no_other(tmp_path):
    held, starts = tmp_path / "held", tmp_path / "starts"
    with subprocess.Popen([sys.executable, "-c", CRASHING, str(tmp_path)], stderr=subprocess.DEVNULL) as parent:
        end = time.monotonic() + 60
        while not starts.exists() or starts.stat().st_size < 8:  # seven that crashed: the next waits 6.4 seconds
            assert time.monotonic() < end
            time.sleep(0.01)
        first = int(held.read_text())
        held.unlink()
        begin = time.monotonic()
        os.kill(first, signal.SIGKILL)
        while not held.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        took = time.monotonic() - begin
        parent.send_signal(signal.SIGTERM)
    assert took < 3 and parent.returncode == 0


ONE_IS_DUE = """
import os, pathlib, socket, sys, time
from pruneofa.serve import server
server._PAUSE = 1
folder = pathlib.Path(sys.argv[1])

def work(place, alone, started):
    if place:
        (folder / "loading").touch()
        while not (folder / "due").exists():
            time.sleep(0.01)
        raise SystemExit(1)
    started()
    while alone and not (folder / "loading").exists():
        time.sleep(0.01)
    (folder / ("due" if alone else "back")).touch()
    time.sleep(0 if alone else 60)

sys.exit(server._prefork(work, 2, folder, socket.socket(), lambda: None))
"""


def test_a_worker_that_is_due_is_waited_for(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ONE_IS_DUE, str(tmp_path)], stderr=subprocess.DEVNULL) as parent:
        while parent.poll() is None and not (tmp_path / "back").exists():
            time.sleep(0.01)
        parent.send_signal(signal.SIGTERM)
    assert parent.returncode == 0


FAILING = """
import errno, pathlib, socket, sys
from pruneofa.errors import NotNow
from pruneofa.serve import server

def work(place, alone, started):
    raise eval(sys.argv[2])

sys.exit(server._prefork(work, 2, pathlib.Path(sys.argv[1]), socket.socket(), lambda: None))
"""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("NotNow('the hub does not answer; try again')", 3, "the hub does not answer; try again"),
        ("ImportError('it needs an extra')", 3, "it needs an extra"),
        ("OSError(errno.EACCES, 'denied', 'model')", 2, "model: denied; check its permissions, or choose another path"),
    ],
)
def test_a_worker_fails_as_one_process_does(tmp_path, error, code, line):
    command = [sys.executable, "-c", FAILING, str(tmp_path), error]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == code and said.stderr == f"pruneofa: error: {line}\n"


def test_workers_end_with_the_program_however_it_ends(start, folders, tmp_path, monkeypatch):
    server = with_workers(start, tmp_path, folders["vectors"], 2)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    assert refused_within(server, 20)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    end = time.monotonic() + 20
    while True:  # the next server removes what this one left, once its workers have ended
        with metrics_folder() as folder:
            if list(tmp_path.glob("pruneofa-metrics-*")) == [folder]:
                break
        assert time.monotonic() < end
        time.sleep(0.05)


def test_only_folders_of_metrics_that_nobody_uses_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("pruneofa-metrics-left", "pruneofa-metrics-of-a-start", "other"):
        (tmp_path / name).mkdir()
    for name in ("pruneofa-metrics-left", "other"):
        (tmp_path / name / "lock").touch()
    (tmp_path / "pruneofa-metrics-link").symlink_to(tmp_path / "other")
    with metrics_folder() as living, metrics_folder() as second:
        assert {path.name for path in tmp_path.iterdir()} == {
            *(living.name, second.name, "other", "pruneofa-metrics-link", "pruneofa-metrics-of-a-start")
        }
    assert not living.exists() and (tmp_path / "other" / "lock").exists()
