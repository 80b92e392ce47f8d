"""The program: its start, its end, and clients that misbehave on real connections."""

import argparse
import gzip
import http.client
import http.server
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
from pruneofa.serve.tracing import EXCLUDED
from tests.serve.asking import ask, metric


def refused(*arguments, code=2):
    command = [sys.executable, "-m", "pruneofa", "serve", *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == code and said.stdout == "" and len(said.stderr.splitlines()) == 1, said.stderr
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


SLOW = """
import sys, time
from pruneofa.cli.main import main
from pruneofa.serve import model

def load(*_, **__):
    print("loading", flush=True)
    time.sleep(60)

model.load = load
sys.exit(main())
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("first", [False, True])
def test_sigterm_while_a_model_is_loaded_ends_the_program(folders, first, workers):
    """Also as the first process of a container, which gets no signal that it does not handle."""
    before = ["unshare", "--pid", "--fork", "--kill-child"] if first else []
    if first and (not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True).returncode):
        pytest.skip("no namespace of processes may be made here")
    command = [*before, sys.executable, "-c", SLOW, "serve", folders["vectors"], "--port", "0", "--workers", workers]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "loading\n"
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
                ended = int(file.read()) if first else process.pid
            os.kill(ended, signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_one_process_shares_no_metrics(start, folders, tmp_path):
    server = start(folders["vectors"], PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "none"))
    assert ask(server, inputs="water")[0] == 200 and metric(server, 'te_request_count{method="single"}') == 1


def test_wrong_input_is_one_line(folders, tmp_path):
    model = folders["vectors"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(model, "--port", port, code=3)  # which a supervisor tries again
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in said
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


@pytest.mark.parametrize(
    ("path", "traced"),
    [
        ("/health", False),
        ("/ping", False),
        ("/metrics?x=1", False),
        ("/v2/health/ready", False),
        ("/models/shopping/embed", True),
        ("/v2/models/healthcare/infer", True),
        ("/v2/models/ping", True),
        ("/embed?next=/health", True),
    ],
)
def test_traces_leave_out_health_and_metrics_only(path, traced):
    assert (re.search(EXCLUDED, f"http://127.0.0.1:3000{path}") is None) == traced


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


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_extra_for_traces_is_missed_before_anything_is_loaded(tmp_path, workers):
    program = "import sys; sys.modules['opentelemetry'] = None; from pruneofa.cli.main import main; sys.exit(main())"
    model = str(tmp_path / "none")
    command = [sys.executable, "-c", program, "serve", model, "--otlp-endpoint", "http://x", "--workers", workers]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 3 and said.stderr.endswith("pip install 'pruneofa[otel]'\n")
    assert len(said.stderr.splitlines()) == 1


def test_a_damaged_folder_is_one_line(folders, tmp_path):
    shutil.copytree(folders["vectors"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    assert str(tmp_path) in refused(tmp_path / "model", "--port", 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_traces_go_to_a_collector_and_continue_the_callers(start, folders, workers):
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
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        server = start(folders["vectors"], "--otlp-endpoint", endpoint, "--workers", workers)
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
