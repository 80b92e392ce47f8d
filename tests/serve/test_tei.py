"""The routes of text-embeddings-inference answer with the engine's own numbers, in its shapes."""

import asyncio
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from pruneofa.serve.app import create_app
from pruneofa.serve.settings import Settings

TEXTS = ["the king of music", "a great film", "water"]


def post(client, path, status=200, **body):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_embed_is_the_engines_vector_scaled_to_length_1(client, models):
    expected = models["vectors"].engine.predict(TEXTS)
    np.testing.assert_allclose(post(client, "/embed", inputs=TEXTS), unit(expected), atol=1e-6)
    np.testing.assert_allclose(post(client, "/embed", inputs=TEXTS[0]), unit(expected)[:1], atol=1e-6)
    np.testing.assert_allclose(post(client, "/embed", inputs=TEXTS, normalize=False), expected, atol=1e-6)


def test_dimensions_are_cut_before_the_length_is_1(client, models):
    expected = unit(models["vectors"].engine.predict(TEXTS)[:, :5])
    np.testing.assert_allclose(post(client, "/embed", inputs=TEXTS, dimensions=5), expected, atol=1e-6)
    assert "smaller than" in post(client, "/embed", 422, inputs="a", dimensions=33)["error"]
    assert "positive" in post(client, "/embed", 422, inputs="a", dimensions=0)["error"]


def test_token_ids_are_computed_as_they_are(client, models):
    ids = [2, 5, 36, 7, 3]
    expected = models["vectors"].engine.encode([ids])[0].mean(axis=0)
    found = post(client, "/embed", inputs=ids, normalize=False)
    np.testing.assert_allclose(found, [expected], atol=1e-6)
    assert post(client, "/embed", inputs=[ids, "water"])[0] == post(client, "/embed", inputs=ids)[0]
    assert "vocabulary" in post(client, "/embed", 422, inputs=[100_000])["error"]


def test_embed_all_has_a_vector_per_token(client, models):
    found = post(client, "/embed_all", inputs=TEXTS[:2])
    assert [len(rows) for rows in found] == [6, 5]
    np.testing.assert_allclose(np.mean(found[0], axis=0), models["vectors"].engine.predict(TEXTS[0]), atol=1e-6)


def test_texts_are_truncated_at_the_side_that_is_asked_for(client, models):
    words = ["king", "water"] + ["music"] * 80 + ["film", "queen"]
    limit = models["vectors"].engine.max_length - 2
    right = post(client, "/embed", inputs=" ".join(words))
    assert right == post(client, "/embed", inputs=" ".join(words[:limit]))
    left = post(client, "/embed", inputs=" ".join(words), truncation_direction="Left")
    assert left == post(client, "/embed", inputs=" ".join(words[-limit:]))
    assert right != left
    error = post(client, "/embed", 422, inputs=" ".join(words), truncate=False)
    assert error["error_type"] == "Validation" and "86 tokens" in error["error"]


def test_token_ids_are_held_to_the_limit_of_texts_and_named_as_the_client_did(client, models):
    limit = models["vectors"].engine.tokenizer.limit
    error = post(client, "/embed", 422, inputs=[[5], [5] * (limit + 1)], truncate=False)
    assert f"inputs[1] has {limit + 1} tokens, the model takes at most {limit}; shorten it" in error["error"]
    assert post(client, "/embed", inputs=[[5] * (limit + 9)]) == post(client, "/embed", inputs=[[5] * limit])
    error = post(client, "/embed", 422, inputs=[[5], [5, 10**6]])
    assert "inputs[1][1] is 1000000" in error["error"]


def test_predictions_are_sorted_by_score(client, models):
    expected = models["topics"].engine.predict(TEXTS[0])["scores"]
    found = post(client, "/predict", inputs=TEXTS[0])
    assert {row["label"]: pytest.approx(row["score"], abs=1e-6) for row in found} == expected
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    pair = models["topics"].engine.predict((TEXTS[0], TEXTS[1]))
    assert post(client, "/predict", inputs=[TEXTS[0], TEXTS[1]])[0]["label"] == pair["label"]
    batch = post(client, "/predict", inputs=[[TEXTS[0]], [TEXTS[0], TEXTS[1]]])
    for row, alone in zip(batch, [found, post(client, "/predict", inputs=[TEXTS[0], TEXTS[1]])], strict=True):
        # NumPy's product of several rows may differ in the last bit from that of one.
        assert [(one["label"], pytest.approx(one["score"], abs=1e-6)) for one in row] == [
            (one["label"], one["score"]) for one in alone
        ]
    assert post(client, "/predict", inputs=[[TEXTS[0]]]) == [found]
    raw = post(client, "/predict", inputs=TEXTS[0], raw_scores=True)
    scores = np.exp([row["score"] for row in raw])
    np.testing.assert_allclose(scores / scores.sum(), [row["score"] for row in found], atol=1e-6)


def test_predictions_have_the_parameters_of_the_inference_api(client):
    raw = post(client, "/predict", inputs=TEXTS[0], raw_scores=True)
    logits = np.array([row["score"] for row in raw])
    expected = {"none": logits, "sigmoid": 1 / (1 + np.exp(-logits)), "softmax": np.exp(logits) / np.exp(logits).sum()}
    for function, scores in expected.items():
        found = post(client, "/predict", inputs=[[TEXTS[0]]], parameters={"function_to_apply": function})[0]
        assert [row["label"] for row in found] == [row["label"] for row in raw]
        np.testing.assert_allclose([row["score"] for row in found], scores, atol=1e-6)
    every = post(client, "/predict", inputs=TEXTS[0], parameters={"top_k": None, "function_to_apply": None})
    assert every == post(client, "/predict", inputs=TEXTS[0])
    assert post(client, "/predict", inputs=TEXTS[0], parameters={"top_k": 2}) == every[:2]
    assert post(client, "/predict", inputs=TEXTS[0], parameters={"top_k": 99}) == every


def test_ranks_are_sorted_and_name_their_text(client, models):
    engine = models["ranks"].engine
    expected = [engine.predict(("who", text))["score"] for text in TEXTS]
    ranks = post(client, "/rerank", query="who", texts=TEXTS, return_text=True)
    assert [rank["index"] for rank in ranks] == list(np.argsort([-score for score in expected]))
    assert all(rank["score"] == pytest.approx(expected[rank["index"]], abs=1e-6) for rank in ranks)
    assert all(rank["text"] == TEXTS[rank["index"]] for rank in ranks)
    raw = post(client, "/rerank", query="who", texts=TEXTS, raw_scores=True)
    assert [1 / (1 + np.exp(-rank["score"])) for rank in raw] == pytest.approx([rank["score"] for rank in ranks])
    assert "text" not in raw[0]


def test_similarity_is_the_cosine(client, models):
    vectors = unit(models["vectors"].engine.predict(TEXTS))
    found = post(client, "/similarity", inputs={"source_sentence": TEXTS[0], "sentences": TEXTS[1:]})
    np.testing.assert_allclose(found, vectors[1:] @ vectors[0], atol=1e-6)
    error = post(client, "/similarity", 400, inputs={"source_sentence": "a", "sentences": []})
    assert error == {"error": "`inputs.sentences` cannot be empty", "error_type": "Empty"}


def test_tokens_and_back(client):
    (tokens,) = post(client, "/tokenize", inputs="the kïng")
    assert tokens[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert tokens[2]["text"] == "kïng" and (tokens[2]["start"], tokens[2]["stop"]) == (4, 9)  # bytes
    (plain,) = post(client, "/tokenize", inputs="the king", add_special_tokens=False)
    assert [token["text"] for token in plain] == ["the", "king"]
    assert post(client, "/decode", ids=[token["id"] for token in plain]) == ["the king"]
    ids = [token["id"] for token in tokens]
    assert post(client, "/decode", ids=[ids], skip_special_tokens=False)[0].startswith("[CLS]")


def test_texts_that_only_fill_memory_are_not_tokenized(client, models):
    most = 128 * models["vectors"].engine.tokenizer.limit
    assert f"wanted at most {most}" in post(client, "/tokenize", 422, inputs=["a", "a" * (most + 1)])["error"]
    assert post(client, "/tokenize", inputs="a " * (most // 2))
    assert len(post(client, "/tokenize", inputs=["a " * (most // 2)] * 4)) == 4
    assert "together" in post(client, "/tokenize", 422, inputs=["a " * (most // 2)] * 5)["error"]


def test_no_more_ids_are_decoded_than_texts_have(client, models):
    most = 128 * models["vectors"].engine.tokenizer.limit
    king = post(client, "/tokenize", inputs="king", add_special_tokens=False)[0][0]["id"]
    found = post(client, "/decode", ids=[[king] * most, [king]] + [[king] * (most - 1)] * 3)
    assert [len(text.split()) for text in found] == [most, 1] + [most - 1] * 3
    error = post(client, "/decode", 422, ids=[king] * (most + 1))["error"]
    assert f"`ids` has {most + 1} token ids, wanted at most {most}" in error
    assert "together" in post(client, "/decode", 422, ids=[[king] * most] * 4 + [[king]])["error"]


def test_hidden_states_count_as_what_they_take_in_memory(models, monkeypatch):
    monkeypatch.setattr("pruneofa.serve.model.STATES", 64)  # two tokens of 32
    model = models["vectors"]
    assert model.states_of(["a" * 8, [1, 2, 3, 4]]) == 6
    with TestClient(create_app([model], Settings(access_log=False, max_concurrent_requests=40))) as client:
        client.app.state.serving.batcher.acquire(31)
        post(client, "/embed_all", 429, inputs="the king of music and water")  # a quarter of 40
        post(client, "/embed", inputs="the king of music and water")


def test_one_text_of_a_pair_may_be_empty(client):
    ranks = post(client, "/rerank", query="who", texts=["the king", "", "water"])
    assert sorted(rank["index"] for rank in ranks) == [0, 1, 2]
    assert len(post(client, "/predict", inputs=[["", "water"], ["water", ""]])) == 2
    assert post(client, "/predict", 400, inputs=[["", ""]])["error_type"] == "Empty"
    assert "NUL" in post(client, "/predict", 422, inputs=[["", "a\0"]])["error"]


def test_every_model_has_the_routes_of_the_first(client):
    text = "the king of music"
    for path in ("/models/topics", "/models/topics/", "/models/topics/invocations"):
        assert post(client, path, inputs=text) == post(client, "/models/topics/predict", inputs=text)
    found = post(client, "/models/topics/vertex", instances=[{"inputs": text}])
    assert found["predictions"] == [post(client, "/models/topics/predict", inputs=text)]
    assert post(client, "/models/ranks", query="a", texts=["b"])[0]["index"] == 0
    post(client, "/models/none", 404, inputs=text)


def test_instances_that_are_too_many_together_are_refused_at_once(models):
    with TestClient(create_app([models["vectors"]], Settings(access_log=False, max_concurrent_requests=50))) as client:
        error = post(client, "/vertex", 422, instances=[{"inputs": ["a"] * 20}] * 3)["error"]
        assert error == "batch size 60 > maximum concurrent requests 50"
        assert len(post(client, "/embed", inputs=["a"] * 32)) == 32  # the others were cancelled
        assert len(post(client, "/vertex", instances=[{"inputs": ["a"] * 20}] * 2)["predictions"]) == 2


def test_inputs_are_in_flight_until_the_response_is_sent(models, monkeypatch):
    monkeypatch.setattr("pruneofa.serve.call._STORED", 100)  # what is longer has to be read first
    app, seen = create_app([models["vectors"]], Settings(access_log=False)), []
    body = [{"type": "http.request", "body": b'{"inputs": ["a", "b"]}'}]

    async def receive():
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message):
        seen.append((message["type"], message.get("more_body", False), app.state.serving.batcher.in_flight))

    async def request():
        scope = {"type": "http", "method": "POST", "path": "/embed", "query_string": b"", "headers": []}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
            assert app.state.serving.batcher.in_flight == 0

    asyncio.run(request())
    kinds = [("http.response.start", False), ("http.response.body", True), ("http.response.body", False)]
    assert seen == [(*kind, 2) for kind in kinds]


def test_prompts_are_put_before_texts(tmp_path, client):
    import json

    from starlette.testclient import TestClient

    from pruneofa.serve.app import create_app
    from pruneofa.serve.model import load
    from pruneofa.serve.settings import Settings
    from tests.tiny import modules_json, write_folder

    folder = write_folder(tmp_path / "prompted", "Model")
    modules = modules_json()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    prompts = {"prompts": {"query": "who ", "text": "film "}, "default_prompt_name": "text"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with TestClient(create_app([load("prompted", folder, threads=1)], Settings(access_log=False))) as prompted:
        assert post(prompted, "/embed", inputs="water") == post(client, "/embed", inputs="film water")
        assert post(prompted, "/embed", inputs="water", prompt_name="query") == post(
            client, "/embed", inputs="who water"
        )
        error = post(prompted, "/embed", 422, inputs="water", prompt_name="none")["error"]
        assert error.endswith("the model's prompts are: query, text")
        assert post(prompted, "/tokenize", inputs="water")[0][1]["text"] == "film"


def test_the_root_does_the_first_models_task(client):
    assert post(client, "/", inputs="water") == post(client, "/embed", inputs="water")
    assert post(client, "/invocations", inputs="water") == post(client, "/embed", inputs="water")
    found = post(client, "/vertex", instances=[{"inputs": "water"}, {"query": "who", "texts": ["king"]}])
    expected = [post(client, "/embed", inputs="water"), post(client, "/rerank", query="who", texts=["king"])]
    assert found == {"predictions": expected}


def test_a_path_names_a_model(client):
    assert post(client, "/models/vectors/embed", inputs="water") == post(client, "/embed", inputs="water")
    assert post(client, "/models/topics/embed", 424, inputs="water") == {
        "error": "Backend error: Model is not an embedding model",
        "error_type": "Backend",
    }
    assert post(client, "/models/none/embed", 404, inputs="water")["error"].startswith("no such model; wanted one of")


def test_headers_tell_what_it_took(client):
    headers = client.post("/embed", json={"inputs": TEXTS[:2]}).headers
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == str(sum(map(len, TEXTS[:2])))
    assert headers["x-compute-tokens"] == "11"
    for name in ("x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"):
        assert headers[name].isdigit()


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/embed", {"inputs": []}, 400, "Empty"),
        ("/embed", {"inputs": ""}, 400, "Empty"),
        ("/embed", {"inputs": ["a", ""]}, 400, "Empty"),
        ("/embed", {"inputs": [[]]}, 400, "Empty"),
        ("/predict", {"inputs": ""}, 400, "Empty"),
        ("/predict", {"inputs": []}, 400, "Empty"),
        ("/rerank", {"query": "a", "texts": []}, 400, "Empty"),
        ("/tokenize", {"inputs": []}, 400, "Empty"),
        ("/decode", {"ids": []}, 400, "Empty"),
        ("/embed", {"inputs": 3}, 422, "Validation"),
        ("/embed", {"inputs": "a", "normalize": "yes"}, 422, "Validation"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "Validation"),
        ("/answer", {"inputs": {"question": "", "context": "a"}}, 400, "Empty"),
        ("/answer", {"inputs": [{"question": "a", "context": ""}]}, 400, "Empty"),
        ("/embed", {}, 422, "Validation"),
        ("/embed", {"inputs": [-1]}, 422, "Validation"),
        ("/embed", {"inputs": ["a"] * 33}, 422, "Validation"),
        ("/embed", {"inputs": "a\0b"}, 422, "Validation"),
        ("/embed", {"inputs": "a\ud800"}, 400, "Validation"),  # no JSON, for the parser as for TEI's
        ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "Validation"),
        ("/predict", {"inputs": ["a", "b", "c"]}, 422, "Validation"),
        ("/models/vectors/predict", {"inputs": "a"}, 424, "Backend"),
        ("/models/topics/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend"),
    ],
)
def test_a_wrong_request_gets_its_own_error(client, path, body, status, kind):
    import json

    response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "error_type"} and response.json()["error_type"] == kind


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/embed", {"inputs": 5}, "inputs: Input should be a valid string or a valid array"),
        ("/embed", {"inputs": [1, 2.5]}, "inputs.1: Input should be a valid integer"),
        ("/embed", {"inputs": ["a", 3.5]}, "inputs.1: Input should be a valid string or a valid array"),
        ("/answer", {"inputs": [{"question": "a"}]}, "inputs.0.context: Field required"),
        ("/decode", {"ids": [[1, -1]]}, "ids.0.1: Input should be greater than or equal to 0"),
        (
            "/vertex",
            {"instances": [{"inputs": 5}]},
            "instances.0.inputs: Input should be a valid string or a",
        ),
        ("/embed", [1], "Input should be an object"),
    ],
)
def test_an_error_names_the_place_and_what_is_accepted(client, path, body, message):
    error = client.post(path, json=body).json()["error"]
    assert error.removeprefix("Input validation error: ").startswith(message)


def test_broken_json_is_400(client):
    for content in (b'{"inputs": ', b"", b"\xff\xfe", b"[NaN"):
        response = client.post("/embed", content=content, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422) and response.json()["error_type"] == "Validation"
    assert client.post("/embed", content=b'{"inputs": ').json()["error"] == "the request's body is not valid JSON"


def test_a_hundred_thousand_wrong_inputs_are_refused_at_the_first(client):
    content = b'{"inputs": [' + b"{}," * 100_000 + b"{}]}"
    begin = time.perf_counter()
    response = client.post("/embed", content=content)
    assert response.status_code == 422 and len(response.content) < 500
    assert client.post("/embed", json={"inputs": ["a"] * 100_000}).status_code == 422
    assert time.perf_counter() - begin < 2
