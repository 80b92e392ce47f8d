"""Keys, limits and the access log; what a broken or slow client gets; that no answer shows the server's inside."""

import asyncio
import json

import pytest
from starlette.testclient import TestClient

from pruneofa.errors import InputError
from pruneofa.serve.access import Access
from pruneofa.serve.app import create_app
from pruneofa.serve.settings import Settings


@pytest.fixture
def served(models):
    """An application with settings of its own."""
    opened = []

    def make(**settings):
        client = TestClient(create_app([models["vectors"]], Settings(**{"access_log": False} | settings)))
        opened.append(client.__enter__())
        return opened[-1]

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def test_a_key_is_asked_for_except_by_health_and_metrics(served):
    client = served(api_key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer "}):
        for path in ("/embed", "/nothing"):  # as text-embeddings-inference answers
            response = client.post(path, json={"inputs": "a"}, headers=headers)
            assert (response.status_code, response.content) == (401, b"")
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/info", headers=headers).status_code == 401
    for path in ("/health", "/ping", "/metrics", "/"):
        assert client.get(path).status_code == 200
    for scheme in ("Bearer", "bearer", "BEARER"):
        right = {"authorization": f"{scheme} secret"}
        assert client.post("/embed", json={"inputs": "a"}, headers=right).status_code == 200
    assert client.post("/", json={"inputs": "a"}).status_code == 401


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/v1/embeddings", {"message", "code", "type"}),
        ("/v1/models", {"message", "code", "type"}),
        ("/v2/rerank", {"message"}),
        ("/v2/models/vectors/infer", {"error"}),
    ],
)
def test_without_the_key_other_protocols_get_their_own_error(served, path, keys):
    response = served(api_key="secret").post(path, json={"input": "a"})
    assert response.status_code == 401 and set(response.json()) == keys
    assert "Authorization: Bearer" in str(response.json())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_batch_tokens", 0),
        ("payload_limit", -1),
        ("max_client_batch_size", 0),
        ("max_client_batch_size", 600),
        ("body_timeout", 0.0),
        ("body_timeout", float("nan")),
        ("body_timeout", float("inf")),
        ("api_key", ""),
        ("api_key", "abc\ndef"),
        ("api_key", "schlüssel"),
        ("api_key", " a"),
    ],
)
def test_settings_with_which_nothing_can_be_served_are_refused(setting, value):
    with pytest.raises(InputError, match=setting):
        Settings(**{setting: value})


def test_the_schema_says_whether_a_key_is_wanted(served):
    for key, security in (("secret", [{"key": []}]), (None, [])):
        headers = {"authorization": f"Bearer {key}"}
        found = served(api_key=key).get("/api-doc/openapi.json", headers=headers).json()
        assert found["security"] == security and "key" in found["components"]["securitySchemes"]


def test_a_request_may_have_as_many_inputs_as_all(served):
    assert Settings().most_inputs == Settings(max_concurrent_requests=32).most_inputs == 32
    client = served(max_concurrent_requests=16)
    assert client.get("/info").json()["max_client_batch_size"] == 16
    assert client.post("/embed", json={"inputs": ["a"] * 17}).status_code == 422
    with pytest.raises(InputError, match="would always refuse; lower it, or raise max_concurrent_requests"):
        Settings(max_client_batch_size=17, max_concurrent_requests=16)


def test_refusals_before_the_routes_are_counted(served):
    client = served(api_key="secret", payload_limit=100)
    client.post("/embed", json={"inputs": "a"})
    client.post("/embed", content=b"x" * 101, headers={"authorization": "Bearer secret"})
    text = client.get("/metrics").text
    for cause in ("unauthorized", "payload"):
        assert f'te_request_failure{{err="{cause}"}} 1.0' in text


def test_a_body_that_is_too_long_is_refused(served):
    client = served(payload_limit=1000)
    for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):  # with a length, and in chunks without one
        response = client.post("/embed", content=content)
        assert response.status_code == 413 and response.headers["connection"] == "close"
        assert response.json() == {"error": "the request's body has more than 1000 bytes", "error_type": "Validation"}
    assert client.post("/v1/embeddings", content=b"x" * 1001).json()["code"] == 413
    assert client.post("/embed", json={"inputs": "x" * 900}).status_code == 200


def test_more_inputs_than_may_be_in_flight_are_refused(served):
    client = served(max_concurrent_requests=3)
    client.app.state.serving.batcher.acquire(1)
    response = client.post("/embed", json={"inputs": ["a"] * 3})
    assert response.status_code == 429
    assert response.json() == {"error": "Model is overloaded", "error_type": "Overloaded"}
    assert client.post("/v1/embeddings", json={"input": ["a"] * 3}).json()["type"] == "Overloaded"
    client.app.state.serving.batcher.release(1)
    assert client.post("/embed", json={"inputs": ["a"] * 3}).status_code == 200
    assert 'te_request_failure{err="overloaded"} 2.0' in client.get("/metrics").text


def test_the_log_has_a_line_per_request_and_no_text(served, capfd):
    client = served(access_log=True, api_key="secret")
    capfd.readouterr()
    client.post("/embed?q=hidden", json={"inputs": "hidden words"}, headers={"authorization": "Bearer secret"})
    client.post("/embed", json={"inputs": "hidden"})
    lines = capfd.readouterr().err.splitlines()
    first, second = map(json.loads, lines)
    assert (first["method"], first["path"], first["status"], first["tokens"]) == ("POST", "/embed", 200, 13)
    assert first["ms"] > 0 and second["status"] == 401
    assert not any(word in line for line in lines for word in ("hidden", "secret"))


def test_no_answer_shows_a_path_or_a_traceback(served, models, monkeypatch, folders, capfd):
    client = TestClient(create_app([models["vectors"]], Settings()), raise_server_exceptions=False)

    def broken(*_, **__):
        raise RuntimeError(f"{folders['vectors']} is broken")

    with client:
        monkeypatch.setattr(models["vectors"], "compute", broken, raising=False)
        answers = [client.post("/embed", json={"inputs": "a"})]
        monkeypatch.setattr("pruneofa.serve.tei.vectors", broken)
        answers.append(client.post("/embed", json={"inputs": "a"}))
    assert [answer.status_code for answer in answers] == [424, 500]
    assert answers[0].json() == {"error": "Backend error: inference failed", "error_type": "Backend"}
    assert answers[1].json() == {"error": "internal error", "error_type": "Internal"}
    for answer in answers:
        assert "broken" not in answer.text and "Traceback" not in answer.text
    said = capfd.readouterr().err
    assert "is broken" in said  # the operator sees it
    assert [json.loads(line)["status"] for line in said.splitlines() if line.startswith("{")] == [424, 500]


def test_a_client_that_sends_its_body_too_slowly_is_told_so():
    sent = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def app(*_):
        raise AssertionError("the route is not reached")

    scope = {"type": "http", "method": "POST", "path": "/embed", "headers": []}
    causes = []
    asyncio.run(Access(app, Settings(body_timeout=0.05, access_log=False), causes.append)(scope, receive, send))
    assert sent[0]["status"] == 408 and causes == ["timeout"]
    assert json.loads(sent[1]["body"]) == {"error": "the request's body took too long", "error_type": "Validation"}


@pytest.mark.parametrize("expect", [None, b"100-continue"])
def test_a_refused_body_that_does_not_come_holds_nothing_up(expect):
    sent, asked = [], []

    async def receive():
        asked.append(1)
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def run():
        headers = [(b"content-length", b"3000000")] + ([(b"expect", expect)] if expect else [])
        scope = {"type": "http", "method": "POST", "path": "/embed", "headers": headers}
        access = Access(None, Settings(access_log=False), lambda cause: None)
        answering = asyncio.create_task(access(scope, receive, send))
        await asyncio.sleep(0.05)
        assert answering.done() == bool(expect)
        answering.cancel()  # as at the end of the server
        await asyncio.wait([answering])

    asyncio.run(run())
    assert sent[0]["status"] == 413 and not sent[-1].get("more_body") and len(asked) == (not expect)


def test_no_other_origin_is_let_in(served):
    response = served().post("/embed", json={"inputs": "a"}, headers={"origin": "https://elsewhere.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
