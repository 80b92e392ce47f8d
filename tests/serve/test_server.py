"""The program: its start, its end, its workers, and clients that misbehave on real connections."""

import argparse
import gzip
import http.client
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from pruneofa.cli import serve
from pruneofa.cli.main import main
from pruneofa.engine.engine import Engine
from pruneofa.serve.server import _state


def ask(server, path="/embed", **body):
    """Status and JSON of a POST."""
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def metric(server, name):
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        found = re.search(rf"^{re.escape(name)} (\S+)$", response.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def refused(*arguments):
    command = [sys.executable, "-m", "pruneofa", "serve", *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 2 and said.stdout == "" and len(said.stderr.splitlines()) == 1, said.stderr
    return said.stderr


def test_it_serves_until_sigterm(start, folders):
    server = start(folders["vectors"], f"second={folders['ranks']}")
    assert server.said[-1] == f"pruneofa: serving vectors, second on {server.url}\n"
    assert server.address[0] == "127.0.0.1"
    assert ask(server, inputs="the king")[0] == 200
    assert ask(server, "/rerank", query="a", texts=["b"])[0] == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    with pytest.raises(ConnectionRefusedError):
        server.connect()


MANY = ("--max-client-batch-size", 20_000, "--max-concurrent-requests", 20_000)


def answers_of_a_long_request_after_sigterm(server):
    """What the client of a request gets that is being computed when SIGTERM comes."""
    found = []
    asking = threading.Thread(target=lambda: found.append(ask(server, inputs=["the king of music"] * 20_000)))
    asking.start()
    end = time.monotonic() + 20
    while not metric(server, "te_batch_next_size_count"):
        assert time.monotonic() < end
    server.process.send_signal(signal.SIGTERM)
    asking.join()
    return found


def test_requests_that_were_accepted_are_answered_after_sigterm(start, folders):
    server = start(folders["vectors"], *MANY)
    [found] = answers_of_a_long_request_after_sigterm(server)
    assert found[0] == 200 and len(found[1]) == 20_000
    assert server.process.wait(20) == 0


def test_what_is_not_answered_in_time_after_sigterm_is_refused(start, folders):
    server = start(folders["vectors"], *MANY, "--grace", 0)
    found = answers_of_a_long_request_after_sigterm(server)
    assert found == [(503, {"error": "the server is ending", "error_type": "Unhealthy"})]
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.process.stderr.read()


@pytest.mark.parametrize("expect", ["", "expect: 100-continue\r\n"])
def test_a_refused_body_that_does_not_come_is_not_waited_for_after_sigterm(start, folders, expect):
    server = start(folders["vectors"], "--max-concurrent-requests", 16)
    with server.connect() as connection:
        connection.sendall(f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n{expect}\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0 and time.monotonic() - begin < 10
    assert "without completing" not in server.process.stderr.read()


def test_clients_that_leave_cost_nothing_more(start, folders):
    server = start(folders["vectors"], "--max-client-batch-size", 20_000, "--max-concurrent-requests", 20_001)
    body = json.dumps({"inputs": ["the king of music and water"] * 20_000}).encode()
    with server.connect() as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        end = time.monotonic() + 20
        while not metric(server, "te_batch_next_size_count"):
            assert time.monotonic() < end
    assert ask(server, inputs="water")[0] == 200
    time.sleep(0.2)
    computed = metric(server, "te_batch_next_size_sum")
    assert computed < 20_000 and metric(server, "te_queue_size") == 0
    assert metric(server, 'te_request_success{method="batch"}') == 0


def test_half_a_request_and_garbage_do_no_harm(start, folders):
    server = start(folders["vectors"])
    with server.connect() as half, server.connect() as garbage, server.connect() as long:
        half.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        garbage.sendall(b"\0\1\2 nothing like HTTP\r\n\r\n")
        assert garbage.recv(1000).startswith(b"HTTP/1.1 400")
        long.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n")
        assert long.recv(1000).startswith(b"HTTP/1.1 413")
        assert ask(server, inputs="water")[0] == 200
    assert ask(server, inputs="water")[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_too_much_gets_to_read_the_answer(start, folders, chunked):
    server = start(folders["vectors"], PRUNEOFA_API_KEY="secret")
    content = b"x" * 10_000_000
    for key, status in (("secret", 413), ("wrong", 401)) * 3:
        connection = http.client.HTTPConnection(*server.address, timeout=30)
        body = iter([content]) if chunked else content
        headers = {"authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/embeddings", body, headers, encode_chunked=chunked)
        response = connection.getresponse()
        assert response.status == status and json.load(response)["code"] == status
        assert connection.sock is None  # the connection is closed


def test_who_sends_far_too_much_is_cut_off(start, folders):
    server = start(folders["vectors"])
    sent = 0
    with server.connect() as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        with pytest.raises(ConnectionError):
            while sent < 100_000_000:
                sent += connection.send(b"x" * 100_000)
    assert 10_000_000 < sent < 60_000_000
    assert ask(server, inputs="water")[0] == 200


def test_the_key_comes_from_a_file_or_the_environment(start, folders, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    for server in (
        start(folders["vectors"], "--api-key-file", tmp_path / "key"),
        start(folders["vectors"], PRUNEOFA_API_KEY="secret"),
    ):
        request = urllib.request.Request(f"{server.url}/info", headers={"authorization": "Bearer secret"})
        assert urllib.request.urlopen(request, timeout=20).status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/info", timeout=20)


def test_wrong_input_is_one_line(folders, tmp_path):
    model = folders["vectors"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in refused(model, "--port", port)
    assert "no such folder" in refused(tmp_path / "none", "--port", 0)
    assert "no such folder" in refused(f"{tmp_path / 'none'}/", "--port", 0)
    assert "give it another" in refused("a\tb=model")
    assert "no such folder" in refused(tmp_path / "none", "--port", 0, "--workers", 2)
    assert "give each a name of its own" in refused(model, model)
    assert "or raise --max-concurrent-requests\n" in refused(model, "--max-client-batch-size", 600)
    (tmp_path / "key").write_text("\n")
    assert "is empty" in refused(model, "--api-key-file", tmp_path / "key")
    (tmp_path / "key").write_text("secret\nother\n")
    said = refused(model, "--api-key-file", tmp_path / "key")
    assert "no header can carry" in said and "secret" not in said
    for name in ("a..b", "x" * 80):
        assert f"cannot listen on {name}, port 0: no name of a host" in refused(model, "--port", 0, "--host", name)


def test_every_number_has_a_range(capsys):
    parser = argparse.ArgumentParser()
    serve.describe(parser)
    for action in parser._actions:
        if action.type is int:
            option = action.option_strings[0]
            for value in ("-1", "9" * 30):
                assert main(["serve", "model", option, value]) == 2
                assert (
                    f"{option} is {value}, wanted {'0' if option in ('--port', '--grace') else '1'} to"
                    in capsys.readouterr().err
                )
            with pytest.raises(SystemExit, match="2"):
                main(["serve", "model", option, "nan"])
            assert "invalid int value: 'nan'" in capsys.readouterr().err


def test_without_the_extra_its_name_is_said(folders):
    program = "import sys; sys.modules['uvicorn'] = None; from pruneofa.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", str(folders["vectors"]), "--port", "0"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 3 and said.stderr.endswith("pip install 'pruneofa[serve]'\n")
    assert len(said.stderr.splitlines()) == 1


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


def test_a_damaged_folder_is_one_line(folders, tmp_path):
    shutil.copytree(folders["vectors"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    assert str(tmp_path) in refused(tmp_path / "model", "--port", 0)


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


def test_traces_go_to_a_collector_and_continue_the_callers(start, folders):
    pytest.importorskip("opentelemetry.instrumentation.asgi", reason="the otel extra is not installed")
    received = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        server = start(folders["vectors"], "--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}")
        trace = "0af7651916cd43dd8448eb211c80319c"
        request = urllib.request.Request(
            f"{server.url}/embed",
            b'{"inputs": "hidden words"}',
            {"content-type": "application/json", "traceparent": f"00-{trace}-b7ad6b7169203331-01"},
        )
        assert urllib.request.urlopen(request, timeout=30).status == 200
        urllib.request.urlopen(f"{server.url}/health", timeout=30)
        server.process.send_signal(signal.SIGTERM)  # what is left is sent before the end
        assert server.process.wait(30) == 0
        collector.shutdown()
    path, content = received[0]
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    assert path == "/v1/traces" and bytes.fromhex(trace) in content and b"/embed" in content
    assert b"hidden" not in content and b"/health" not in content
