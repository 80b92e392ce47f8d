"""Metrics by the engine are those by torch: the same rows, tokens, order of labels and choice of answers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from pruneofa import Engine, recipe
from pruneofa.data.tasks import load_task
from pruneofa.errors import InputError
from pruneofa.formats.pack import pack
from pruneofa.train import evaluate as module
from pruneofa.train.evaluate import evaluate, evaluate_engine, evaluate_model, load_task_model
from tests.tiny import half_pruned, tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta, tiny_tokenizer, write_model

FAMILIES = {"Bert": tiny_bert, "DistilBert": tiny_distilbert, "Roberta": tiny_roberta, "MPNet": tiny_mpnet}
CLASSES = ["bad", "fine", "good"]
CONTEXT = "the king of the city was not good and the people of the river had a great book about two games "


def save(folder, family, head, **config):
    """A folder whose model gives lively logits: its answers differ from row to row."""
    model = FAMILIES[family](getattr(transformers, f"{family}For{head}"), **config)
    return write_model(folder, half_pruned(model, noise=0.3, seed=3))


def named(labels):
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)}}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def own(tmp_path):
    random = np.random.default_rng(0)
    words = CONTEXT.split()
    rows = [
        {"a": " ".join(random.choice(words, random.integers(1, 30))), "b": str(random.choice(words)),
         "label": CLASSES[i % 3]}
        for i in range(80)
    ]  # fmt: skip
    data = str(write(tmp_path / "own.jsonl", rows))
    return recipe.Task(data=data, validation=data, text=["a", "b"], label="label", max_length=24)


@pytest.fixture
def questions(tmp_path):
    words = CONTEXT.split()
    rows = []
    for index in range(12):
        answer = words[3 * index % len(words)]
        context = CONTEXT * (1 + index % 4)
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"id": str(index), "question": "who was the king"[: 4 + index], "context": context,
                     "answers": answers})  # fmt: skip
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", rows)
    return recipe.Task(data=str(tmp_path), max_length=32, stride=8)


def logits_of(batches, count):
    found = [None] * count
    for rows, heads in batches:
        for index, *parts in zip(rows, *heads, strict=True):
            found[index] = parts
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [CLASSES, ["good", "bad", "fine"]])
def test_classification(tmp_path, own, family, order):
    if family == "Roberta":  # a model with a single token type, by a tokenizer that gives two
        own = own.model_copy(update={"text": "a"})
    folder = save(tmp_path / "model", family, "SequenceClassification", **named(order))
    wanted = evaluate(folder, "mine", own)
    assert 10 < wanted["accuracy"] < 90
    assert evaluate(folder, "mine", own, engine=True, precision="fp32") == wanted
    pack(folder, tmp_path / "packed", precision="fp32")
    assert evaluate(tmp_path / "packed", "mine", own, precision="fp32", threads=1, isa="scalar") == wanted
    engine = Engine.from_pretrained(folder, precision="fp32")
    task = load_task("mine", own, tiny_tokenizer(), train=False, labels=order)
    data = task.evaluations[""]
    by_engine = logits_of(module._engine_forward(engine, task, data), len(data))
    model = load_task_model(folder, "classification")
    with torch.no_grad():
        by_torch = logits_of(module._forward(model, task, data, 16, "fp32", "t"), len(data))
    np.testing.assert_allclose(np.array(by_engine), np.array(by_torch), rtol=1e-4, atol=1e-4)
    assert evaluate_engine(engine, task).values == evaluate_model(model, task).values


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "MPNet"])
def test_question_answering(tmp_path, questions, family):
    folder = save(tmp_path / "model", family, "QuestionAnswering")
    task = load_task("squad", questions, tiny_tokenizer(), train=False)
    data = task.evaluations[""]
    assert len(data) > 2 * data.rows.num_rows
    engine = Engine.from_pretrained(folder, precision="fp32")
    engine_logits = logits_of(module._engine_forward(engine, task, data), len(data))
    model = load_task_model(folder, "qa")
    with torch.no_grad():
        torch_logits = logits_of(module._forward(model, task, data, 4, "fp32", "t"), len(data))
    for computed, wanted, length in zip(engine_logits, torch_logits, data.lengths, strict=True):
        assert [len(part) for part in computed] == [length, length]
        np.testing.assert_allclose(computed, [part[:length] for part in wanted], rtol=1e-4, atol=1e-4)
    by_torch, by_engine = (
        module._answers(task, data, batches)
        for batches in (_no_grad(model, task, data), module._engine_forward(engine, task, data))
    )
    assert by_engine == by_torch and len(set(by_engine[0])) > 3
    pack(folder, tmp_path / "packed", precision="fp32")
    assert evaluate(tmp_path / "packed", "squad", questions, precision="fp32") == evaluate(folder, "squad", questions)


def test_the_engine_predicts_the_answers_that_are_evaluated(tmp_path, questions):
    folder = save(tmp_path / "model", "Bert", "QuestionAnswering")
    engine = Engine.from_pretrained(folder, precision="fp32")
    task = load_task("squad", questions.model_copy(update={"max_length": 64, "stride": 28}), tiny_tokenizer(),
                     train=False)  # fmt: skip
    data = task.evaluations[""]
    texts, _ = module._answers(task, data, module._engine_forward(engine, task, data))
    rows = data.rows.to_pylist()
    pairs = [{"question": row["question"], "context": row["context"]} for row in rows]
    room = [64 - 3 - len(tiny_tokenizer().tokenize(row["question"])) for row in rows]
    same = [i for i, left in enumerate(room) if left // 2 == 28]  # the engine's windows share half of their room
    got = engine.predict(pairs)
    assert same and [got[i]["answer"] for i in same] == [texts[i] for i in same]
    assert all(0 <= answer["score"] <= 1 for answer in got)


def _no_grad(model, task, data):
    with torch.no_grad():
        yield from module._forward(model, task, data, 64, "fp32", "t")


def test_known_tasks_give_the_same_metrics_as_torch(tmp_path):
    texts = {"mnli": ("premise", "hypothesis"), "qqp": ("question1", "question2"), "sst2": ("sentence",)}
    for name, columns in texts.items():
        data = tmp_path / name
        data.mkdir()
        labels = {"mnli": ["contradiction", "entailment", "neutral"], "qqp": ["not_duplicate", "duplicate"]}
        folder = save(tmp_path / f"{name}-model", "Bert", "SequenceClassification",
                      **named(labels.get(name, ["LABEL_0", "LABEL_1"])))  # fmt: skip
        rows = [dict.fromkeys(columns, word) | {"label": i % 2} for i, word in enumerate(CONTEXT.split())]
        splits = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
        for begin, split in enumerate(["train", *splits]):
            write(data / f"{split}.jsonl", rows[begin:])
        spec = recipe.Task(data=str(data), max_length=16).resolved(name)
        wanted = evaluate(folder, name, spec)
        assert evaluate(folder, name, spec, engine=True, precision="fp32") == wanted
        assert set(evaluate(folder, name, spec, engine=True)) == set(wanted)
        assert ("accuracy_mm" in wanted) == (name == "mnli") and ("f1" in wanted) == (name == "qqp")


def test_it_says_who_computed(tmp_path, own, capsys):
    folder = save(tmp_path / "model", "Bert", "SequenceClassification", **named(CLASSES))
    evaluate(folder, "mine", own, engine=True, isa="scalar", threads=1)
    assert "evaluate mine: 80 rows, by the engine in int8 on scalar\n" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(tmp_path, own, questions):
    classifier = save(tmp_path / "classifier", "Bert", "SequenceClassification", **named(CLASSES))
    pack(classifier, tmp_path / "int8")
    pack(save(tmp_path / "mlm", "Bert", "MaskedLM"), tmp_path / "mlm-packed")
    pack(save(tmp_path / "xy", "Bert", "SequenceClassification", **named(["x", "y"])), tmp_path / "xy-packed")
    with pytest.raises(InputError, match="packed as int8, but precision='fp32' was requested"):
        evaluate(tmp_path / "int8", "mine", own, precision="fp32")
    with pytest.raises(InputError, match="its head is for classification, --task squad needs question answ"):
        evaluate(tmp_path / "int8", "squad", questions)
    with pytest.raises(InputError, match="its head is for masked-LM, --task mine needs classification"):
        evaluate(tmp_path / "mlm-packed", "mine", own)
    with pytest.raises(InputError, match="label 'bad' in validation row 1"):
        evaluate(tmp_path / "xy-packed", "mine", own)
    with pytest.raises(InputError, match="max_length is 99 but the model has 64 positions|tokenizer's limit is 64"):
        evaluate(tmp_path / "int8", "mine", own.model_copy(update={"max_length": 99}))
    for wrong in ({"precision": "int8"}, {"threads": 1}, {"isa": "scalar"}):
        with pytest.raises(InputError, match="need the engine, but torch runs this folder; add --engine"):
            evaluate(classifier, "mine", own, **wrong)
    with pytest.raises(InputError, match="precision is 'bf16'"):
        evaluate(classifier, "mine", own, engine=True, precision="bf16")
    with pytest.raises(InputError, match="neither|no such folder"):
        evaluate(tmp_path / "nothing", "mine", own, engine=True)
    task = SimpleNamespace(name="mine", kind="classification", labels=["a", "b"], names_by_id=None)
    with pytest.raises(InputError, match="tasks.mine: the model's labels are bad, fine, good"):
        evaluate_engine(Engine.from_pretrained(classifier), task)


def test_logits_refuse_what_is_not_the_models(tmp_path):
    engine = Engine.from_pretrained(save(tmp_path / "model", "Bert", "SequenceClassification", **named(CLASSES)))
    assert engine.labels == CLASSES
    ids = np.array([2, 7, 3], np.int64)
    [alone] = engine.logits([ids])
    assert alone.shape == (3,) and alone.dtype == np.float32
    assert not np.array_equal(alone, engine.logits([ids], [np.array([0, 0, 1])])[0])
    assert engine.logits([]) == []
    with pytest.raises(InputError, match=r"input_ids\[1, 0\] is 9999, wanted 0 to \d+: the vocabulary size is"):
        engine.logits([ids, np.array([9999])])
    masked = Engine.from_pretrained(save(tmp_path / "mlm", "Bert", "MaskedLM"))
    assert masked.labels == []
    with pytest.raises(InputError, match="task is masked-LM, but logits needs classification or question answering"):
        masked.logits([ids])
