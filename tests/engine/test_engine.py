"""The engine against transformers, architecture by architecture and head by head, and against itself."""

import json
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
import transformers

from pruneofa import Engine
from pruneofa.engine.threads import choose_threads
from pruneofa.errors import InputError
from pruneofa.formats import packed, pattern
from pruneofa.formats.pack import pack
from tests.tiny import (
    half_pruned,
    tiny_bert,
    tiny_distilbert,
    tiny_mpnet,
    tiny_roberta,
    tiny_tokenizer,
    write_folder,
    write_model,
)

FAMILIES = {"Bert": tiny_bert, "DistilBert": tiny_distilbert, "Roberta": tiny_roberta, "MPNet": tiny_mpnet}
TEXTS = ["the great film", "who was king of the city by the river and the sea?", "bad", "a terrible story, not new."]
FLOAT = {"rtol": 1e-4, "atol": 1e-4}
INT8 = 0.06  # of the largest value: two layers of random weights, which round worse than trained ones


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder and model of a family and head, with lively weights of which the encoder has lost half."""
    models = {}

    def make(family, head, **config):
        key = f"{family}{head}{config}"
        if key not in models:
            model = half_pruned(FAMILIES[family](getattr(transformers, f"{family}{head}"), **config))
            models[key] = write_model(tmp_path_factory.mktemp("model"), model), model
        return models[key]

    return make


def torch_inputs(family, texts, pairs=None):
    inputs = tiny_tokenizer()(texts, pairs, padding=True, return_tensors="pt")
    if family != "Bert":
        inputs.pop("token_type_ids")
    return inputs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_matches_transformers(family, made, kernels):
    folder, model = made(family, "Model")
    inputs = torch_inputs(family, TEXTS)
    inputs["input_ids"][1, 3] = model.config.pad_token_id  # in the text: some families' positions leave it out
    wanted = run(model, inputs).last_hidden_state.numpy()
    arrays = {name: value.numpy() for name, value in inputs.items()}
    padded = arrays["attention_mask"] == 0

    got = Engine.from_pretrained(folder, precision="fp32", threads=2).encode(**arrays)
    np.testing.assert_allclose(got[~padded], wanted[~padded], **FLOAT)
    assert got.dtype == np.float32 and padded.any() and not got[padded].any()

    rounded = Engine.from_pretrained(folder, threads=2).encode(**arrays)
    assert np.abs(rounded - got).max() < INT8 * np.abs(got).max()


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_every_activation_matches_transformers(activation, made, kernels):
    folder, model = made("Bert", "Model", hidden_act=activation)
    ids = np.arange(5, 25)[None]
    wanted = run(model, {"input_ids": torch.from_numpy(ids)}).last_hidden_state.numpy()
    np.testing.assert_allclose(Engine.from_pretrained(folder, precision="fp32").encode(ids), wanted, **FLOAT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("config", "scores"),
    [
        ({"num_labels": 3}, lambda logits: logits.softmax(-1)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda logits: logits),
    ],
    ids=["single", "multi", "one", "regression"],
)
def test_classification_matches_transformers(family, config, scores, made, kernels):
    folder, model = made(family, "ForSequenceClassification", **config)
    wanted = scores(run(model, torch_inputs(family, TEXTS)).logits)
    results = Engine.from_pretrained(folder, precision="fp32").predict(TEXTS)
    for result, row in zip(results, wanted, strict=True):
        assert list(result["scores"]) == list(model.config.id2label.values())
        assert list(result["scores"].values()) == pytest.approx(row.tolist(), abs=1e-4)
        assert result["label"] == model.config.id2label[int(row.argmax())]
        assert result["score"] == result["scores"][result["label"]]


def test_pairs_get_their_token_types(made, kernels):
    folder, model = made("Bert", "ForSequenceClassification", num_labels=3)
    wanted = run(model, torch_inputs("Bert", [TEXTS[0]], [TEXTS[1]])).logits.softmax(-1)[0].tolist()
    result = Engine.from_pretrained(folder, precision="fp32").predict((TEXTS[0], TEXTS[1]))
    assert list(result["scores"].values()) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_classification_matches_transformers(family, made, kernels):
    folder, model = made(family, "ForTokenClassification", num_labels=4)
    text = "the King's river!"
    wanted = run(model, torch_inputs(family, [text])).logits.softmax(-1)[0, 1:-1]
    found = Engine.from_pretrained(folder, precision="fp32").predict(text)
    assert [token["label"] for token in found] == [model.config.id2label[int(index)] for index in wanted.argmax(-1)]
    assert [token["score"] for token in found] == pytest.approx(wanted.amax(-1).tolist(), abs=1e-4)
    assert [token["word"] for token in found] == ["the", "King", "'", "s", "river", "!"]
    assert all(text[token["start"] : token["end"]] == token["word"] for token in found)


@pytest.mark.parametrize(
    ("family", "head"), [*((family, "ForMaskedLM") for family in FAMILIES), ("Bert", "ForPreTraining")]
)
def test_masked_lm_matches_transformers(family, head, made, kernels):
    folder, model = made(family, head)
    text = "the [MASK] of the [MASK]."
    inputs = torch_inputs(family, [text])
    outputs = run(model, inputs)
    logits = outputs["prediction_logits" if head == "ForPreTraining" else "logits"]
    masked = inputs["input_ids"][0] == tiny_tokenizer().mask_token_id
    best = logits[0, masked].softmax(-1).topk(5)
    found, none_of_it = Engine.from_pretrained(folder, precision="fp32").predict([text, "[MASK]"])
    assert len(found) == 2 and len(none_of_it) == 1
    for position, ids, scores in zip(found, best.indices, best.values, strict=True):
        assert list(position["scores"]) == tiny_tokenizer().convert_ids_to_tokens(ids.tolist())
        assert list(position["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-4)
        assert position["score"] == position["scores"][position["label"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_question_answering_takes_the_best_span_of_all_windows(family, made, kernels):
    folder, model = made(family, "ForQuestionAnswering")
    question, context = "who was king?", "The river, the city and the sea. " * 6 + "A Queen, not the king!"
    tokenizer = tiny_tokenizer()
    room = 64 - 3 - len(tokenizer.tokenize(question))
    inputs = tokenizer(question, context, truncation="only_second", max_length=64, stride=room // 2, padding=True,
                       return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt")  # fmt: skip
    offsets = inputs.pop("offset_mapping")
    inputs.pop("overflow_to_sample_mapping")
    segments = [encoding.sequence_ids for encoding in inputs.encodings]
    if family != "Bert":
        inputs.pop("token_type_ids")
    outputs = run(model, inputs)
    inside = torch.tensor([[segment == 1 for segment in owner] for owner in segments])
    starts, ends = outputs.start_logits.double(), outputs.end_logits.double()
    best = (-torch.inf,)
    for window, owner in enumerate(inside):
        n_best = [set(x[window].masked_fill(~owner, -1e9).topk(20).indices.tolist()) for x in (starts, ends)]
        for first in n_best[0]:
            for last in n_best[1]:
                total = float(starts[window, first] + ends[window, last])
                if owner[first] and owner[last] and first <= last < first + 30 and total > best[0]:
                    best = (total, int(offsets[window, first, 0]), int(offsets[window, last, 1]))
    score = float(torch.tensor(best[0]) - starts[inside].logsumexp(0) - ends[inside].logsumexp(0))
    assert len(segments) > 1
    answer = Engine.from_pretrained(folder, precision="fp32").predict({"question": question, "context": context})
    assert (answer["start"], answer["end"]) == best[1:]
    assert answer["answer"] == context[answer["start"] : answer["end"]]
    assert answer["score"] == pytest.approx(np.exp(score), abs=1e-4)


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda hidden: hidden.mean(0)),
        ({"pooling_mode_cls_token": True}, lambda hidden: hidden[0]),
        ({"pooling_mode": "max"}, lambda hidden: hidden.amax(0)),
        (None, lambda hidden: hidden.mean(0)),
    ],
    ids=["mean", "cls", "max", "bare"],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_embeddings_follow_their_folder(pooling, pool, normalize, made, kernels, tmp_path):
    folder, model = made("Bert", "Model")
    if pooling is not None:
        modules = [
            ("", "sentence_transformers.Transformer"),
            ("1_Pooling", "sentence_transformers.Pooling"),
            ("2_Normalize", "sentence_transformers.Normalize"),
        ]
        folder = tmp_path
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        entries = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in modules[: 2 + normalize]]
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    rows = Engine.from_pretrained(folder, precision="fp32").predict(TEXTS)
    assert rows.shape == (4, 32) and rows.dtype == np.float32
    for row, text in zip(rows, TEXTS, strict=True):
        wanted = pool(run(model, torch_inputs("Bert", [text])).last_hidden_state[0])
        if normalize and pooling is not None:
            wanted = wanted / wanted.norm()
        np.testing.assert_allclose(row, wanted.numpy(), **FLOAT)


# One float that rounds another way can move an int8 code by one.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("int8", 5e-3)])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "Model"])
def test_a_ragged_batch_equals_one_by_one(precision, tolerance, head, kernels, tmp_path):
    engine = Engine.from_pretrained(write_folder(tmp_path, head), precision=precision, threads=2)
    texts = [" ".join(["good river"] * count) for count in (9, 1, 30, 2, 25, 1)]
    alone = [numbers(engine.predict(text)) for text in texts]
    for batch_size in (1, 4, 32):
        together = engine.predict(texts, batch_size=batch_size)
        for one, same in zip(alone, together, strict=True):
            assert numbers(same) == pytest.approx(one, abs=tolerance)


def numbers(result):
    """The scores of a result, or the vector."""
    if isinstance(result, dict):
        return list(result["scores"].values())
    return [token["score"] for token in result] if isinstance(result, list) else result.tolist()


def test_padding_changes_nothing(kernels, tmp_path):
    engine = Engine.from_pretrained(write_folder(tmp_path, "Model"))
    ids = np.arange(5, 17).reshape(2, 6)
    padded = np.pad(ids, ((0, 0), (0, 50)), constant_values=-100)  # what stands there is not even read
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 50)))
    mask[1, 3:6] = 0
    got = engine.encode(padded, mask.astype(bool))
    assert got.shape == (2, 56, 32) and not got[0, 6:].any() and not got[1, 3:].any()
    np.testing.assert_allclose(got[:1, :6], engine.encode(ids[:1]), atol=1e-5)
    np.testing.assert_allclose(got[1:, :3], engine.encode(ids[1:, :3]), atol=1e-5)
    np.testing.assert_array_equal(engine.encode(ids.tolist()), engine.encode(ids.astype(np.uint8)))


def test_packed_folders_give_what_their_source_gives(kernels, tmp_path):
    folder = write_folder(tmp_path / "folder")
    for precision in ("int8", "fp32"):
        pack(folder, tmp_path / precision, precision=precision)
    text = "the king was good"
    direct = Engine.from_pretrained(folder).predict(text)
    assert Engine.from_pretrained(tmp_path / "int8").predict(text) == direct
    assert Engine.from_pretrained(tmp_path / "fp32").predict(text) == direct  # quantized as it is loaded
    exact = Engine.from_pretrained(folder, precision="fp32").predict(text)
    assert Engine.from_pretrained(tmp_path / "fp32", precision="fp32").predict(text) == exact != direct


def test_truncation_when_asked_for(kernels, tmp_path):
    engine = Engine.from_pretrained(write_folder(tmp_path), precision="fp32")
    long, short = " ".join(["good"] * 100), "bad river"
    assert engine.predict(long, truncate=True) == engine.predict(" ".join(["good"] * 62))
    assert engine.predict((long, short), truncate=True) == engine.predict((" ".join(["good"] * 59), short))
    assert engine.predict((short, long), truncate=True) == engine.predict((short, " ".join(["good"] * 59)))
    assert engine.predict((long, long), truncate=True) == engine.predict(
        (" ".join(["good"] * 30), " ".join(["good"] * 31))
    )


def test_several_engines_and_python_threads_run_at_once(kernels, tmp_path):
    folder = write_folder(tmp_path)
    engines = [Engine.from_pretrained(folder, threads=threads) for threads in (1, 2)]
    texts = ["the river", "a good king was a great king", "film?"]
    wanted = engines[0].predict(texts)
    results = {}

    def work(number):
        results[number] = [engines[number % 2].predict(texts) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == wanted for number in range(4) for result in results[number])


def test_attributes_say_what_runs(kernels, tmp_path, monkeypatch):
    folder = write_folder(tmp_path, "ForQuestionAnswering")
    monkeypatch.delenv("PRUNEOFA_ISA", raising=False)
    engine = Engine.from_pretrained(folder)
    assert engine.isa == engine.available_isas()[-1]
    assert (engine.precision, engine.task, engine.max_length) == ("int8", "question answering", 64)
    assert len(engine.choices()) == 12
    monkeypatch.setenv("PRUNEOFA_ISA", "scalar")
    assert Engine.from_pretrained(folder).isa == "scalar"
    assert Engine.from_pretrained(folder, isa=engine.isa).isa == engine.isa  # the argument wins


def test_the_environment_forces_a_path(tmp_path, monkeypatch):
    folder = write_folder(tmp_path)
    for isa in Engine.available_isas():
        monkeypatch.setenv("PRUNEOFA_ISA", isa)
        assert Engine.from_pretrained(folder).isa == isa


@pytest.mark.parametrize("name", ["neon", "AMX", "amx ", "sse2"])
def test_a_path_that_is_not_there_is_refused_with_those_that_are(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PRUNEOFA_ISA", name)
    listed = ", ".join(Engine.available_isas())
    with pytest.raises(InputError, match=f"PRUNEOFA_ISA is '{name}', .* wanted one of {listed}$"):
        Engine.from_pretrained(write_folder(tmp_path))


def test_a_prediction_needs_neither_torch_nor_transformers(kernels, tmp_path):
    write_folder(tmp_path)
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import pruneofa
assert "numpy" not in sys.modules
from pruneofa.engine import engine
from pruneofa.engine import reference
if {kernels!r} == "reference":
    engine.native = reference
print(pruneofa.Engine.from_pretrained({str(tmp_path)!r}).predict("the river")["label"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("label ")


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_linears_do_not_stay_in_memory_as_packed(tmp_path, precision):
    pack(write_folder(tmp_path / "model"), tmp_path / "packed", precision=precision)
    model = packed.read(tmp_path / "packed")
    bitmasks = [weakref.ref(linear.bitmask) for linear in model.linears.values()]
    engine = Engine(model, precision=precision, threads=choose_threads(1), isa="scalar")
    assert len(bitmasks) == 13 and all(alive() is None for alive in bitmasks)
    same = Engine.from_pretrained(tmp_path / "packed", precision=precision, threads=1, isa="scalar")
    assert engine.predict("the great film") == same.predict("the great film")


@pytest.mark.parametrize("name", ["Identity", "Sigmoid"])
@pytest.mark.parametrize("old", [False, True])
def test_a_cross_encoder_keeps_its_activation(name, old, made, kernels, tmp_path):
    full = {"Identity": "torch.nn.modules.linear.Identity", "Sigmoid": "torch.nn.modules.activation.Sigmoid"}[name]
    key = {"sbert_ce_default_activation_function": full} if old else {"sentence_transformers": {"activation_fn": full}}
    logits = Engine.from_pretrained(
        write_folder(tmp_path / "raw", problem_type="regression"), precision="fp32"
    ).predict("a good film")
    got = Engine.from_pretrained(write_folder(tmp_path / "ce", **key), precision="fp32").predict("a good film")
    raw = np.array(numbers(logits))
    assert numbers(got) == pytest.approx(raw if name == "Identity" else 1 / (1 + np.exp(-raw)), abs=1e-5)
    with pytest.raises(ValueError, match="is 'torch.nn.Tanh' in config.json, wanted Identity or Sigmoid"):
        Engine.from_pretrained(write_folder(tmp_path / "no", sentence_transformers={"activation_fn": "torch.nn.Tanh"}))


def test_truncate_dim_cuts_after_normalizing(kernels, tmp_path):
    write_folder(tmp_path, "Model")
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in kinds])
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    whole = Engine.from_pretrained(tmp_path, precision="fp32").predict(TEXTS[:1])
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": 8}))
    np.testing.assert_array_equal(Engine.from_pretrained(tmp_path, precision="fp32").predict(TEXTS[:1]), whole[:, :8])


def test_sparsity_is_that_of_the_encoder(tmp_path):
    folder = write_folder(tmp_path / "model")
    for precision in ("int8", "fp32"):
        found = Engine.from_pretrained(folder, precision=precision, threads=1).sparsity
        assert found == pytest.approx(pattern.inspect(folder)["encoder"])
