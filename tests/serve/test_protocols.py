"""OpenAI's, Cohere's and Jina's routes, and what the server says of itself."""

import base64
import re

import numpy as np
import pytest
from starlette.testclient import TestClient

from pruneofa.errors import InputError
from pruneofa.serve.app import create_app
from pruneofa.serve.model import Model
from pruneofa.serve.settings import Settings


def test_openai_embeddings(client):
    found = client.post("/v1/embeddings", json={"input": ["the king", "water"], "model": "anything"}).json()
    assert found["object"] == "list" and found["model"] == "vectors"
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [row["index"] for row in found["data"]] == [0, 1]
    expected = client.post("/embed", json={"inputs": ["the king", "water"]}).json()
    assert [row["embedding"] for row in found["data"]] == expected
    assert client.post("/embeddings", json={"input": "water"}).json()["data"][0]["embedding"] == expected[1]


def test_openai_takes_as_many_inputs_as_its_clients_send(models):
    def served(**limits):
        return TestClient(create_app([models["vectors"]], Settings(access_log=False, **limits)))

    many, body = ["the king", "water"] * 20, {"input": ["a"] * 40, "encoding_format": "base64"}
    with served(max_concurrent_requests=64) as client:
        batcher = client.app.state.serving.batcher
        batcher.acquire(32)  # more than 32 inputs count as 32, or a quarter of 64 if that were more
        found = client.post("/v1/embeddings", json={"input": many}).json()["data"]
        expected = client.post("/embed", json={"inputs": many[:2]}).json()
        np.testing.assert_allclose([row["embedding"] for row in found], expected * 20, atol=1e-6)
        assert client.post("/v1/embeddings", json={"input": ["a"] * 2048}).status_code == 200
        refused = client.post("/v1/embeddings", json={"input": ["a"] * 2049})
        assert refused.status_code == 422 and refused.json()["message"].endswith("allowed batch size 2048")
        assert client.post("/embed", json={"inputs": many}).status_code == 422
        batcher.acquire(1)
        assert client.post("/v1/embeddings", json=body).status_code == 429
    with served(max_client_batch_size=39) as client:
        assert client.post("/v1/embeddings", json=body).status_code == 422


def test_openai_base64_and_dimensions(client):
    body = {"input": [[2, 5, 3]], "encoding_format": "base64", "dimensions": 6}
    (row,) = client.post("/v1/embeddings", json=body).json()["data"]
    vector = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
    expected = client.post("/embed", json={"inputs": [[2, 5, 3]], "dimensions": 6}).json()[0]
    np.testing.assert_allclose(vector, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"input": []}, 400, "Empty"),
        ({"input": "a", "dimensions": 0}, 422, "Validation"),
        ({"input": "a", "encoding_format": "hex"}, 422, "Validation"),
        ({"input": "a", "model": "topics"}, 424, "Backend"),
    ],
)
def test_openai_errors_are_flat(client, body, status, kind):
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == status
    assert set(response.json()) == {"message", "code", "type"}
    assert (response.json()["code"], response.json()["type"]) == (status, kind)


def test_one_model_answers_for_any_name_and_of_several_one_must_be_named(client, models):
    asked = [("/v1/embeddings", {"input": "water"}), ("/v2/rerank", {"query": "who", "documents": ["water"]})]
    for path, body in asked:
        assert client.post(path, json=body | {"model": "text-embedding-3-small"}).status_code == 200
    twice = [Model(name, models[task].engine) for task in ("vectors", "ranks") for name in (task, f"{task} too")]
    with TestClient(create_app([*twice, models["topics"]], Settings(access_log=False))) as several:
        for (path, body), task in zip(asked, ("vectors", "ranks"), strict=True):
            for name in (None, task, f"{task} too"):
                answer = several.post(path, json=body | {"model": name})
                assert answer.status_code == 200 and answer.json()["model"] == (name or task)
            for name in ("nope", ""):
                answer = several.post(path, json=body | {"model": name})
                assert answer.status_code == 404
                assert answer.json()["message"] == f"no such model; wanted one of {task}, {task} too"
            assert several.post(path, json=body | {"model": "topics"}).status_code == 424


def test_openai_lists_the_models(client, models):
    found = client.get("/v1/models").json()
    assert found["object"] == "list" and [model["id"] for model in found["data"]] == list(models)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_cohere_and_jina_rerank(client, path):
    texts = ["the king of music", "a great film", "water"]
    body = {"query": "who", "documents": [*texts[:2], {"text": texts[2]}], "top_n": 2, "return_documents": True}
    found = client.post(path, json=body).json()
    expected = client.post("/rerank", json={"query": "who", "texts": texts}).json()[:2]
    assert [(row["index"], row["relevance_score"]) for row in found["results"]] == [
        (rank["index"], rank["score"]) for rank in expected
    ]
    assert found["results"][0]["document"] == {"text": texts[found["results"][0]["index"]]}
    assert client.post(path, json={"query": "who", "documents": []}).json() == {
        "message": "`documents` cannot be empty"
    }
    assert client.post(path, json=body | {"top_n": 0}).status_code == 422


def test_info_names_the_model_and_the_engine(client, models):
    info = client.get("/info").json()
    assert info["model_id"] == "vectors" and info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["max_client_batch_size"] == 32 and info["max_input_length"] == 64
    assert info["engine"]["sparsity"] == pytest.approx(0.5, abs=0.05) and info["engine"]["threads"] == 1
    assert client.get("/models/ranks/info").json()["model_type"] == {
        "reranker": {"id2label": {"0": "label 0"}, "label2id": {"label 0": 0}}
    }
    assert list(client.get("/models/entities/info").json()["model_type"]) == ["token_classification"]
    assert list(client.get("/models/answers/info").json()["model_type"]) == ["question_answering"]


def test_health_and_metrics(client):
    def value(name):
        text = client.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    for path in ("/health", "/ping", "/"):
        assert client.get(path).status_code == 200
    before = {
        name: value(name) for name in ('te_request_count{method="batch"}', "te_embed_count", "te_batch_next_tokens_sum")
    }
    lengths = value("te_request_input_length_count")
    empty = value('te_request_failure{err="validation"}')
    client.post("/embed", json={"inputs": ["the king", "water"]})
    client.post("/embed", json={"inputs": "a", "dimensions": 0})
    after = {name: value(name) for name in before}
    assert [after[name] - before[name] for name in before] == [1, 2, 7]
    assert value("te_request_input_length_count") == lengths + 2
    assert value('te_request_failure{err="validation"}') == empty + 1
    assert value("te_queue_size") == 0
    text = client.get("/metrics").text
    for part in ("request", "embed"):
        for name in ("duration", "tokenization_duration", "queue_duration", "inference_duration"):
            assert f"# TYPE te_{part}_{name} histogram" in text
    assert "# TYPE te_request_count counter" in text and "_total" not in text


def test_unknown_routes_and_methods_answer_in_json(client):
    assert client.get("/nothing").json() == {"error": "Not Found", "error_type": "NotFound"}
    response = client.get("/embed")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    response = client.request("TRACE", "/")
    assert response.status_code == 405 and response.headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize("name", ["{x}", "a/b"])
def test_a_model_is_not_named_like_a_parameter_of_a_route(models, name):
    with pytest.raises(InputError, match="a model is named .*; wanted one without slashes and braces"):
        create_app([Model(name, models["topics"].engine)])


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/embed/", {"error", "error_type"}),
        ("/v1/embeddings/", {"message", "code", "type"}),
        ("/v1/rerank/", {"message"}),
        ("/v2/models/vectors/infer/", {"error"}),
        ("/v2/nothing", {"error"}),
    ],
)
def test_a_slash_too_many_is_no_redirect_to_where_the_client_says(client, path, keys):
    response = client.post(path, json={}, headers={"host": "elsewhere.example"}, follow_redirects=False)
    assert response.status_code == 404 and "location" not in response.headers
    assert set(response.json()) == keys


def test_the_schema_names_every_route(client):
    paths = client.get("/api-doc/openapi.json").json()["paths"]
    assert {"/embed", "/predict", "/rerank", "/v1/embeddings", "/v2/rerank", "/models/{model}/embed"} <= set(paths)
    assert "$ref" in paths["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
