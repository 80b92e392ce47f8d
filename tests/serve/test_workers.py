"""The workers of a server: they share a port, come back, and end with it."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from pruneofa.engine.engine import Engine
from pruneofa.serve.server import _state
from tests.serve.asking import ask, metric


def workers_of(server):
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as file:
        return {int(process) for process in file.read().split()}


def test_workers_share_a_port_and_a_dead_one_comes_back(start, folders):
    server = start(folders["vectors"], "--workers", 2)
    expected = Engine.from_pretrained(folders["vectors"], threads=1).predict("the king")
    first = workers_of(server)
    end = time.monotonic() + 30
    while len(first) < 2:
        assert time.monotonic() < end
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
    assert metric(server, 'te_request_count{method="single"}') > 10  # of all workers together
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
    server = start(tmp_path / "model", "--workers", 2, TMPDIR=str(tmp_path))
    expected = ask(server, inputs="the king")
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("pruneofa-metrics-*/gauge_livesum_*.db"))) < 2:  # both have loaded the model as it was
        assert time.monotonic() < end
        time.sleep(0.05)
    first = workers_of(server)
    weights = tmp_path / "model" / "model.safetensors"
    os.replace(shutil.copy(weights, tmp_path / "other"), weights)
    os.kill(min(first), signal.SIGKILL)
    for line in server.process.stderr:
        if "changed since the server started" in line:
            break
    assert ask(server, inputs="the king") == expected
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_every_file_of_a_model_is_watched(folders, tmp_path):
    shutil.copytree(folders["vectors"], tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    states = [_state(tmp_path / "model")]
    for name in ("quantization.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        (tmp_path / "model" / name).write_text("{}")
        states.append(_state(tmp_path / "model"))
    assert all(before != after for before, after in itertools.pairwise(states))


CRASHING = """
import os, pathlib, sys, time
from pruneofa.serve import server
server._PAUSE, server._SHORT_LIFE, server._LOOK = 0.05, 0.5, 0.02
folder = pathlib.Path(sys.argv[1])

def work(started):
    with open(folder / "starts", "a") as file:
        file.write("x")
    try:
        held = os.open(folder / "held", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        raise SystemExit(1)  # a worker that ends at once, again and again
    os.write(held, b"%d" % os.getpid())
    started()
    time.sleep(60)

sys.exit(server._prefork(work, 2, folder, lambda: None))
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


def test_workers_end_with_the_program_however_it_ends(start, folders):
    server = start(folders["vectors"], "--workers", 2)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    end = time.monotonic() + 20
    while True:
        try:
            server.connect().close()
        except ConnectionRefusedError:
            break
        assert time.monotonic() < end
        time.sleep(0.05)
