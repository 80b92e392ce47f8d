"""Entities, answers and masked words over HTTP are the engine's."""

import asyncio
import math
import time
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from pruneofa.engine.entities import find_entities
from pruneofa.serve.app import create_app
from pruneofa.serve.call import Call, ClientLeft
from pruneofa.serve.model import load
from pruneofa.serve.settings import Settings
from tests.serve.conftest import QUIET

TEXT = "the king of music and the queen of film"


def post(client, path, status=200, **body):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def engine_entities(model, text, **options):
    engine = model.engine
    windows = engine.tokenizer.text_windows([text], ["text"])
    scores = model.compute(windows, [False] * len(windows))
    return find_entities(engine.head, engine.tokenizer, text, windows, scores, **options)


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_entities_of_texts_of_any_length(client, models, aggregation):
    long = " ".join([TEXT] * 20)
    options = {"aggregation_strategy": aggregation, "ignore_labels": []}
    found = post(client, "/classify_tokens", inputs=[TEXT, long], parameters=options)
    for text, entities in zip([TEXT, long], found, strict=True):
        expected = engine_entities(models["entities"], text, aggregation=aggregation, ignore=[])
        assert [one | {"score": pytest.approx(one["score"], abs=1e-6)} for one in entities] == expected
    assert found[1][-1]["end"] == len(long)
    assert post(client, "/classify_tokens", inputs=TEXT, parameters=options) == found[0]


def test_what_is_no_entity_is_left_out(client):
    everything = post(client, "/classify_tokens", inputs=TEXT, parameters={"ignore_labels": []})
    default = post(client, "/classify_tokens", inputs=TEXT)
    assert default == [one for one in everything if one["entity_group"] != "O"]


def test_answers_are_the_engines(client, models):
    question = {"question": "who", "context": " ".join([TEXT] * 20)}
    expected = models["answers"].engine.predict(question)
    found = post(client, "/answer", inputs=question)
    assert found == expected | {"score": pytest.approx(expected["score"], abs=1e-6)}
    other = {"question": "what", "context": TEXT}
    many = post(client, "/answer", inputs=[question] + [other] * 31)
    assert many[0] == found and many[31] == post(client, "/answer", inputs=other)


def test_too_many_questions_are_refused_before_anything_is_made_of_them(client, monkeypatch):
    monkeypatch.setattr("pruneofa.serve.answers.Question.model_dump", None)
    question = {"question": "who", "context": TEXT}
    assert "batch size 33 >" in post(client, "/answer", 422, inputs=[question] * 33)["error"]


def test_masked_words_are_the_engines(client, models):
    expected = models["words"].engine.predict("the [MASK] of music")[0]
    found = post(client, "/fill_mask", inputs="the [MASK] of music")
    assert [word["token_str"] for word in found] == list(expected["scores"])
    assert found[0]["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert found[0]["sequence"] == f"the {expected['label']} of music"
    assert "[MASK]" in post(client, "/fill_mask", 422, inputs="the king")["error"]


def test_words_are_as_many_and_those_that_are_asked_for(client):
    text = "the [MASK] of music"
    every = post(client, "/fill_mask", inputs=text, parameters={"top_k": 100})
    assert post(client, "/fill_mask", inputs=text, parameters={"top_k": 2, "targets": None}) == every[:2]
    found = post(client, "/fill_mask", inputs=text, parameters={"targets": ["water", "king", "king"]})
    assert sorted(word["token_str"] for word in found) == ["king", "water"]
    assert found[0]["score"] > found[1]["score"]
    assert [word for word in every if word["token_str"] in ("king", "water")] == [one for one in found if one in every]
    assert post(client, "/fill_mask", inputs=text, parameters={"targets": "king", "top_k": 1})[0]["token_str"] == "king"
    wrong = (["the king"], "has 2 tokens"), ([""], "has 0 tokens"), ("king " * 60, "has 300 characters")
    for targets, message in (([], "cannot be empty"), *wrong):
        assert message in post(client, "/fill_mask", 400 if not targets else 422, inputs=text,
                               parameters={"targets": targets})["error"]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "inputs", "parameters"),
    [
        ("/predict", TEXT, {"return_all_scores": True}),
        ("/predict", TEXT, {"top_k": 0}),
        ("/predict", TEXT, {"function_to_apply": "relu"}),
        ("/fill_mask", "the [MASK]", {"top_p": 1}),
        ("/fill_mask", "the [MASK]", {"top_k": 0}),
        ("/answer", {"question": "who", "context": TEXT}, {"top_k": 3}),
        ("/answer", {"question": "who", "context": TEXT}, {"top_k": 1, "handle_impossible_answer": True}),
        ("/classify_tokens", TEXT, {"stride": 3}),
    ],
)
def test_a_parameter_that_would_change_nothing_is_refused(client, path, inputs, parameters):
    assert list(parameters)[-1] in post(client, path, 422, inputs=inputs, parameters=parameters)["error"]


def test_the_name_of_an_unknown_parameter_may_be_a_number(client):
    for name in ("7", "7" * 5000):
        error = post(client, "/fill_mask", 422, inputs="the [MASK]", parameters={name: 1})["error"]
        assert f"parameters.{name[:60]}: Extra inputs" in error


def test_parameters_with_the_values_that_hold_anyway(client):
    question = {"question": "who", "context": TEXT}
    given = {"top_k": 1, "align_to_words": True, "handle_impossible_answer": False, "doc_stride": None}
    assert post(client, "/answer", inputs=question, parameters=given) == post(client, "/answer", inputs=question)


def test_what_is_cut_off_is_told(models):
    long = "music " * 200
    settings = Settings(access_log=False, auto_truncate=False)
    with TestClient(create_app(list(models.values()), settings)) as strict:
        assert "tokens" in post(strict, "/fill_mask", 422, inputs=f"the [MASK] {long}")["error"]
        assert "question" in post(strict, "/answer", 422, inputs={"question": long, "context": "a"})["error"]
        post(strict, "/answer", inputs={"question": "who", "context": long})
        post(strict, "/classify_tokens", inputs=long)
    with TestClient(create_app([models["words"]], Settings(**QUIET))) as client:
        assert len(post(client, "/fill_mask", inputs=f"the [MASK] {long}")) == 5
        for text, cut in ((f"{long} [MASK]", "1 of its 1"), (f"the [MASK] [MASK] {long} [MASK]", "1 of its 3")):
            assert f"has {cut} [MASK] behind the" in post(client, "/fill_mask", 422, inputs=text)["error"]


@pytest.mark.parametrize(
    ("path", "inputs"), [("/classify_tokens", TEXT), ("/answer", {"question": "who", "context": TEXT})]
)
def test_no_text_is_read_beyond_a_length(client, monkeypatch, path, inputs):
    monkeypatch.setattr("pruneofa.serve.model.MAX_CONTEXT", len(TEXT) - 1)
    assert f"wanted at most {len(TEXT) - 1}" in post(client, path, 422, inputs=inputs)["error"]
    monkeypatch.undo()
    post(client, path, inputs=inputs)


def test_masks_count_as_inputs_and_are_limited(models, monkeypatch):
    assert models["words"].windows_of(["[MASK] [MASK]", "[MASK]"]) == 3
    monkeypatch.setattr("pruneofa.serve.model.MAX_MASKS", 3)
    with TestClient(create_app([models["words"]], Settings(**QUIET))) as client:
        assert len(post(client, "/fill_mask", inputs="[MASK] " * 3)) == 3
        assert "has 4 masks, wanted at most 3" in post(client, "/fill_mask", 422, inputs="[MASK] " * 4)["error"]


def test_a_question_that_leaves_windows_of_few_tokens(client, models, monkeypatch):
    monkeypatch.setattr("pruneofa.engine.tokenizer.MAX_WINDOWS", 10)
    inputs = {"question": "who", "context": "music " * 300}
    post(client, "/answer", inputs=inputs)
    question = "music " * (models["answers"].engine.tokenizer.limit - 25)
    error = post(client, "/answer", 422, inputs=inputs | {"question": question})["error"]
    assert "windows of" in error and "wanted at most 10" in error


def test_windows_of_a_long_question_count(models, monkeypatch):
    model = models["answers"]
    limit = model.engine.tokenizer.limit
    short, long = ({"question": "a" * 4 * tokens, "context": "b" * 400} for tokens in (8, limit))
    assert model.windows_of([short, short]) == 2 * (1 + math.ceil((100 - (limit - 8)) / ((limit - 8) // 2)))
    assert model.windows_of([long]) == 1 + math.ceil((100 - 16) / 8)
    monkeypatch.setattr("pruneofa.serve.batching.MAX_WINDOWS", 10)
    with TestClient(create_app([model], Settings(**QUIET))) as client:
        text = {"question": "music " * (limit - 25), "context": "music " * 50}
        post(client, "/answer", inputs=text)
        assert "windows together, wanted at most 10" in post(client, "/answer", 422, inputs=[text] * 9)["error"]


def test_nothing_more_is_done_for_a_client_that_has_left():
    done = []

    async def left():
        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        call = Call({"app": SimpleNamespace(state=SimpleNamespace(serving=None))}, receive)
        assert await call.each(str, 3) == ["0", "1", "2"]
        gone.set()
        with pytest.raises(ClientLeft):
            await call.each(lambda index: (time.sleep(0.01), done.append(index)), 3)

    asyncio.run(left())
    assert len(done) < 3


def test_windows_count_as_inputs(models):
    windows = {"entities": 1 + 4000 // (4 * models["entities"].engine.tokenizer.limit), "vectors": 0}
    assert windows["entities"] > 10
    assert {name: models[name].windows_of(["a" * 4000]) for name in windows} == windows
    settings = Settings(access_log=False, max_concurrent_requests=40)
    with TestClient(create_app([models["entities"]], settings)) as client:
        batcher = client.app.state.serving.batcher
        batcher.acquire(31)
        post(client, "/classify_tokens", 429, inputs="music " * 600)  # a quarter of 40
        post(client, "/classify_tokens", inputs=["music"] * 9)
        batcher.release(1)
        post(client, "/classify_tokens", inputs="music " * 600)
        assert batcher.in_flight == 30


def test_masked_words_are_those_of_transformers(folders):
    pytest.importorskip("torch")
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    folder = folders["words"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    fill = pipeline("fill-mask", AutoModelForMaskedLM.from_pretrained(folder), tokenizer=tokenizer)
    joined = False
    with TestClient(create_app([load("words", folder, threads=1, precision="fp32")], Settings(**QUIET))) as exact:
        for text in ("The king[MASK] of music.", "a [MASK] b [MASK]", "water [MASK], [MASK]! [MASK]", "[MASK]"):
            expected = fill(text)
            found = post(exact, "/fill_mask", inputs=text)
            joined |= "##" in str(expected)  # a part of a word, which joins the word before it
            for ours, theirs in zip(
                *([rows] if "score" in rows[0] else rows for rows in (found, expected)), strict=True
            ):
                assert ours == [row | {"score": pytest.approx(row["score"], abs=1e-5)} for row in theirs]
    assert joined


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/classify_tokens", {"inputs": ""}, 400),
        ("/classify_tokens", {"inputs": "a", "parameters": {"aggregation_strategy": "best"}}, 422),
        ("/answer", {"inputs": {"question": "a"}}, 422),
        ("/answer", {"inputs": {"question": "", "context": "a"}}, 400),
        ("/answer", {"inputs": []}, 400),
        ("/models/vectors/answer", {"inputs": {"question": "a", "context": "b"}}, 424),
        ("/models/vectors/classify_tokens", {"inputs": "a"}, 424),
        ("/models/vectors/fill_mask", {"inputs": "a"}, 424),
    ],
)
def test_wrong_requests(client, path, body, status):
    assert set(post(client, path, status, **body)) == {"error", "error_type"}
