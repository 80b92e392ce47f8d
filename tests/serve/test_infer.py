"""The Open Inference Protocol: health, metadata, and the same results in JSON and in binary."""

import asyncio
import json
import struct

import numpy as np
import pytest

from pruneofa.serve import infer as module

TEXTS = ["the king", "water"]


def text(name="text", values=TEXTS):
    return {"name": name, "datatype": "BYTES", "shape": [len(values)], "data": list(values)}


def ids(data, shape, datatype="INT64", name="input_ids"):
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def infer(client, model, *inputs, status=200, **body):
    response = client.post(f"/v2/models/{model}/infer", json={"inputs": list(inputs), **body})
    assert response.status_code == status, response.text
    return response.json()


def outputs(answer):
    return {output["name"]: output for output in answer["outputs"]}


def test_health_and_metadata(client):
    for path in (
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/topics/ready",
        "/v2/models/topics/versions/1",
    ):
        assert client.get(path).status_code == 200
    found = client.get("/v2/models/topics").json()
    assert found["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [output["name"] for output in found["outputs"]] == ["scores", "label"]
    for path in ("/v2/models/none", "/v2/models/topics/versions/7", "/v2/models/topics/versions/7/ready"):
        assert client.get(path).status_code == 404
    assert client.post("/v2/models/topics/versions/7/infer", json={"inputs": [text()]}).status_code == 404
    assert client.post("/v2/models/topics/versions/1/infer", json={"inputs": [text()]}).status_code == 200
    assert set(client.get("/v2/models/none/ready").json()) == {"error"}


def test_vectors_of_texts_and_of_token_ids(client):
    expected = client.post("/embed", json={"inputs": TEXTS}).json()
    answer = infer(client, "vectors", text(), id="7")
    assert (answer["model_name"], answer["id"]) == ("vectors", "7")
    found = outputs(answer)["embedding"]
    assert (found["datatype"], found["shape"]) == ("FP32", [2, 32])
    np.testing.assert_allclose(np.reshape(found["data"], found["shape"]), expected, atol=1e-6)
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [2, 4], "data": [[2, 5, 36, 3], [2, 7, 3, 0]]}
    mask = {"name": "attention_mask", "datatype": "INT64", "shape": [2, 4], "data": [1, 1, 1, 1, 1, 1, 1, 0]}
    found = outputs(infer(client, "vectors", ids, mask))["embedding"]
    expected = client.post("/embed", json={"inputs": [[2, 5, 36, 3], [2, 7, 3]]}).json()
    np.testing.assert_allclose(np.reshape(found["data"], (2, 32)), expected, atol=1e-6)


def test_a_mask_may_be_of_bool(client):
    inputs = ids([[2, 5, 36, 3], [2, 7, 3, 0]], [2, 4])
    mask = [[1, 1, 1, 1], [1, 1, 1, 0]]
    expected = outputs(infer(client, "vectors", inputs, ids(mask, [2, 4], name="attention_mask")))
    assert expected != outputs(infer(client, "vectors", inputs))
    as_bool = ids([[bool(one) for one in row] for row in mask], [2, 4], "BOOL", "attention_mask")
    assert outputs(infer(client, "vectors", inputs, as_bool)) == expected
    described = ids(None, [2, 4], "BOOL", "attention_mask") | {"parameters": {"binary_data_size": 8}}
    response = client.post("/v2/models/vectors/infer", **binary([inputs, described], bytes([1, 2, 255, 1, 1, 1, 1, 0])))
    assert outputs(response.json()) == expected


def test_too_many_rows_are_refused_before_anything_is_made_of_them(client, monkeypatch):
    monkeypatch.setattr(module, "TokenIds", None)
    monkeypatch.setattr(module, "read", None)
    many = [1] * 33, [33, 1]
    for inputs in ([text(values=["a"] * 33)], [ids(*many)], [ids([1], [1, 1]), ids(*many, name="attention_mask")]):
        error = infer(client, "vectors", *inputs, status=422)
        assert error == {"error": "batch size 33 > maximum allowed batch size 32"}


def test_token_types_are_those_of_the_request(client, models):
    pairs = [("the king", "water"), ("music", "a great film")]
    tokens = models["topics"].engine.tokenizer.sequences(pairs, ["a", "b"], truncate=False)
    longest = max(len(one.ids) for one in tokens)
    rows = {
        "input_ids": [one.ids for one in tokens],
        "attention_mask": [np.ones(len(one.ids), int) for one in tokens],
        "token_type_ids": [one.types for one in tokens],
    }
    inputs = [
        {"name": name, "datatype": "INT64", "shape": [2, longest],
         "data": [[*row.tolist(), *[0] * (longest - len(row))] for row in given]}
        for name, given in rows.items()
    ]  # fmt: skip
    texts = [text(values=[first for first, _ in pairs]), text("text_pair", [second for _, second in pairs])]
    expected = outputs(infer(client, "topics", *texts))["scores"]["data"]
    found = outputs(infer(client, "topics", *inputs))["scores"]["data"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert outputs(infer(client, "topics", *inputs[:2]))["scores"]["data"] != pytest.approx(expected, abs=1e-4)
    empty = {"name": "input_ids", "datatype": "INT64", "shape": [2, 0], "data": []}
    assert "cannot be empty" in infer(client, "topics", empty, status=400)["error"]
    inputs[2]["data"][0][0] = 2
    assert "token_type_ids[0, 0] is 2" in infer(client, "topics", *inputs, status=422)["error"]


@pytest.mark.parametrize(
    ("model", "inputs", "wanted"),
    [
        ("topics", [text(), text("text_pairs")], "text, text_pair, or input_ids, attention_mask, token_type_ids"),
        ("topics", [text(), {"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "data": [2]}], "wanted only"),
        ("topics", [{"name": "attention_mask", "datatype": "INT64", "shape": [1, 1], "data": [1]}], "input_ids is mis"),
        ("entities", [text(), text("text_pair")], "the inputs are text, text_pair; wanted only text"),
        ("answers", [text("question"), text("context"), text()], "wanted only question, context"),
    ],
)
def test_an_input_that_would_not_be_used_is_refused(client, model, inputs, wanted):
    assert wanted in infer(client, model, *inputs, status=422)["error"]


def test_other_tasks(client):
    found = outputs(infer(client, "topics", text(), text("text_pair", ["a", "b"])))
    pairs = client.post("/predict", json={"inputs": [["the king", "a"], ["water", "b"]]}).json()
    assert found["label"]["data"] == [pair[0]["label"] for pair in pairs]
    assert np.reshape(found["scores"]["data"], (2, 3)).max(axis=1) == pytest.approx([p[0]["score"] for p in pairs])
    found = outputs(infer(client, "answers", text("question", ["who"]), text("context", ["the king of music"])))
    answer = client.post("/answer", json={"inputs": {"question": "who", "context": "the king of music"}}).json()
    assert {name: output["data"][0] for name, output in found.items()} == {
        **answer,
        "score": pytest.approx(answer["score"]),
    }
    for model, path, words in (("entities", "/classify_tokens", "the king"), ("words", "/fill_mask", "the [MASK]")):
        found = outputs(infer(client, model, text(values=[words])))
        assert json.loads(found["json"]["data"][0]) == client.post(path, json={"inputs": words}).json()


def binary(inputs, tail, **body):
    head = json.dumps({"inputs": inputs, **body}).encode()
    return {"content": head + tail, "headers": {"Inference-Header-Content-Length": str(len(head))}}


def elements(*values):
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def test_binary_tensors_both_ways(client):
    tail = elements(*(value.encode() for value in TEXTS))
    described = {"name": "text", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(tail)}}
    for wanted in ({"parameters": {"binary_data_output": True}}, {"outputs": [
        {"name": "label", "parameters": {"binary_data": True}}, {"name": "scores", "parameters": {"binary_data": True}}
    ]}):  # fmt: skip
        response = client.post("/v2/models/topics/infer", **binary([described], tail, **wanted))
        length = int(response.headers["inference-header-content-length"])
        found = outputs(json.loads(response.content[:length]))
        rest = response.content[length:]
        parts = {}
        for name, output in found.items():
            size = output["parameters"]["binary_data_size"]
            parts[name], rest = rest[:size], rest[size:]
        assert rest == b""
        expected = outputs(infer(client, "topics", text()))
        np.testing.assert_allclose(np.frombuffer(parts["scores"], "<f4"), expected["scores"]["data"], atol=1e-6)
        assert parts["label"] == elements(*(label.encode() for label in expected["label"]["data"]))


def test_bytes_that_belong_to_no_input_are_refused(client):
    tail = elements(b"a good film")
    described = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(tail)}}
    for given, rest, message in (
        (text("text", ["a"]), tail, f"{len(tail)} bytes behind the JSON are of no input"),
        (described, tail + b"xyz", "3 bytes behind the JSON are of no input"),
        (described | {"data": ["a"]}, tail, "text: has data and binary_data_size, wanted one of them"),
    ):
        response = client.post("/v2/models/topics/infer", **binary([given], rest))
        assert response.status_code == 422 and message in response.json()["error"]


@pytest.mark.parametrize(
    "given",
    [
        {"parameters": {"binary_data_output": "false"}},
        {"outputs": [{"name": "label", "parameters": {"binary_data": 0}}]},
    ],
)
def test_a_flag_is_true_or_false(client, given):
    assert "wanted true or false" in infer(client, "topics", text(), **given, status=422)["error"]


def test_only_the_outputs_that_are_wanted(client):
    assert list(outputs(infer(client, "topics", text(), outputs=[{"name": "label"}]))) == ["label"]
    assert "scores, label" in infer(client, "topics", text(), outputs=[{"name": "none"}], status=422)["error"]
    assert "twice" in infer(client, "topics", text(), outputs=[{"name": "label"}] * 2, status=422)["error"]


def test_large_tensors_are_written_by_a_thread(client, monkeypatch):
    def no_event_loop(array):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return b"1234"

    monkeypatch.setattr(module, "to_bytes", no_event_loop)
    monkeypatch.setattr("pruneofa.serve.call._INLINE", 30)
    body = {"inputs": [text()], "parameters": {"binary_data_output": True}}
    assert client.post("/v2/models/vectors/infer", json=body).content.endswith(b"1234")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "text is missing"),
        ([text(), text()], "given twice"),
        ([text() | {"shape": [3]}], "has 2 elements"),
        ([text() | {"shape": [-1]}], "shape.0: Input should be greater than or equal to 0"),
        ([text() | {"shape": [10**9]}], "shape.0: Input should be less than or equal to 10000000"),
        ([text() | {"shape": [10**4000] * 3}], "shape.0: Input should be less"),
        ([text() | {"shape": [10**7, 2]}], "at most 10000000 elements"),
        ([text("text", []) | {"shape": [0, 10**7, 10**7]}], "at most 10000000 elements"),
        ([text("text", ["a"]) | {"shape": [1] * 70}], "shape: List should have at most 8 items"),
        ([text() | {"data": [1, 2]}], "wanted strings"),
        ([text() | {"shape": [33], "data": ["a"] * 33}], "batch size 33 > maximum allowed batch size 32"),
        ([text() | {"data": ["a", ["b"]]}], "wanted strings"),
        ([text() | {"data": [["a"], "b"], "shape": [2, 1]}], "neither flat nor nested"),
        ([text() | {"data": [["a", "b"]]}], "neither flat nor nested"),
        ([text() | {"data": [["a"], ["b"]]}], "wanted strings"),
        ([ids([[2, 7, 3], [2, 8, 3]], [3, 2])], "neither flat nor nested in the shape [3, 2]"),
        ([ids([[2, 7, 3, 2, 8, 3]], [2, 3])], "neither flat nor nested"),
        ([ids([[[2, 7, 3]], [[2, 8, 3]]], [2, 3])], "neither flat nor nested"),
        ([text() | {"datatype": "INT64"}], "wanted values of type INT64"),
        ([text() | {"datatype": "INT64", "data": [1, 2.5]}], "wanted values"),
        ([ids([1, 2], [1, 2], "BOOL")], "wanted values of type BOOL"),
        ([ids([True, False], [1, 2], "BOOL")], "integers (batch, seq)"),
        ([text() | {"datatype": "INT4", "data": [1, 2]}], "datatype is not one of"),
        ([text() | {"datatype": "INT64", "data": [1, 2]}], "wanted datatype BYTES"),
        ([{"name": "input_ids", "datatype": "INT64", "shape": [2], "data": [1, 2]}], "is [2], wanted (batch, seq)"),
        ([{"name": "input_ids", "datatype": "INT64", "shape": [128], "data": [2] * 128}], "[128], wanted (batch, seq)"),
        ([{"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "data": [2] * 9}], "9 values, but the shape"),
        ([{"name": "input_ids", "datatype": "UINT8", "shape": [1, 1], "data": [300]}], "out of the range"),
        ([text(), text("text_pair", ["a"])], "text_pair 1"),
        ([text() | {"data": None, "parameters": {"binary_data_size": 5}}], "does not fit"),
    ],
)
def test_tensors_that_are_not_what_they_say(client, inputs, message):
    error = infer(client, "vectors", *inputs, status=422)["error"]
    assert message in error and len(error) < 200


@pytest.mark.parametrize("tail", [b"\x05\0\0\0ab", b"\x05\0", b"\x02\0\0\0\xff\xfe", elements(b"a")])
def test_binary_texts_that_are_broken(client, tail):
    described = {"name": "text", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(tail)}}
    response = client.post("/v2/models/vectors/infer", **binary([described], tail))
    assert response.status_code == 422 and set(response.json()) == {"error"}
