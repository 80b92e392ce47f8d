import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
)

from pruneofa import recipe
from pruneofa.data.tasks import load_task
from pruneofa.errors import InputError
from pruneofa.run.fine_tuning import Losses, task_student, transfer_objective
from pruneofa.train import evaluate as evaluation
from pruneofa.train.evaluate import evaluate, evaluate_model, label_order, load_task_model
from tests.tiny import tiny_bert, tiny_distilbert, tiny_tokenizer

CLASSES = ["bad", "fine", "good"]


class Oracle(torch.nn.Module):
    """Answers from a table of tokens -> logits, whatever the batch looks like."""

    def __init__(self, labels, answer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(model_type="distilbert", id2label=dict(enumerate(labels)), num_labels=len(labels))
        self.answer, self.shapes = answer, []

    def forward(self, input_ids, attention_mask):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        lengths = attention_mask.sum(1).tolist()
        outputs = [self.answer(row[:n].tolist()) for row, n in zip(input_ids, lengths, strict=True)]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor(outputs), len(self.config.id2label)))


def write(path, table):
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")


@pytest.fixture
def own(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": "film " * int(rng.integers(1, 20)) + CLASSES[i % 3], "label": CLASSES[i % 3]} for i in range(60)]
    write(tmp_path / "d.jsonl", rows)
    data = str(tmp_path / "d.jsonl")
    return recipe.Task(data=data, validation=data, text="text", label="label", max_length=32)


def last_word(labels):
    tokenizer = tiny_tokenizer()
    ids = [tuple(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in labels]
    return lambda tokens: next(i for i, t in enumerate(ids) if tuple(tokens[-1 - len(t) : -1]) == t)


def test_own_task_whatever_the_order_of_the_models_labels(own):
    task = load_task("mine", own, tiny_tokenizer())
    for labels in (["bad", "fine", "good"], ["good", "bad", "fine"], ["GOOD", "Fine", "bad"]):
        model = Oracle(labels, last_word([label.lower() for label in labels])).train()
        assert evaluate_model(model, task).values == {"accuracy": 100.0, "f1": 100.0}
        assert model.training


def test_accuracy_and_macro_f1_in_percent(own):
    task = load_task("mine", own, tiny_tokenizer())
    result = evaluate_model(Oracle(CLASSES, lambda _: 0), task).values
    assert result == {"accuracy": pytest.approx(100 / 3), "f1": pytest.approx(100 / 6)}
    assert all(type(value) is float for value in result.values())


def test_batches_are_sorted_and_filled(own, monkeypatch):
    monkeypatch.setattr(
        "pruneofa.train.evaluate.evaluation_seconds", lambda *_, **__: 0.0
    )  # it would try a few rows first
    task = load_task("mine", own, tiny_tokenizer())
    model = Oracle(CLASSES, lambda _: 0)
    evaluate_model(model, task, batch_size=2)
    widths = [width for _, width in model.shapes]
    assert widths == sorted(widths, reverse=True)
    assert sum(count for count, _ in model.shapes) == 60
    assert max(count for count, _ in model.shapes) <= 16
    assert max(count * width for count, width in model.shapes) <= 2 * 128 * 1.5  # widths are rounded up to 8


def glue(tmp_path, name, rows):
    splits = ["train", "validation_matched", "validation_mismatched"] if name == "mnli" else ["train", "validation"]
    for split in splits:
        write(tmp_path / f"{split}.jsonl", rows if split != "validation_mismatched" else rows[:1])
    return load_task(name, recipe.Task(data=str(tmp_path), max_length=16), tiny_tokenizer())


def test_metrics_of_the_known_tasks(tmp_path):
    pairs = [{"question1": "a", "question2": "b", "label": label} for label in (1, 1, 1, 0)]
    task = glue(tmp_path, "qqp", pairs)
    result = evaluate_model(Oracle(task.labels, lambda _: 1), task).values
    assert result == {"accuracy": 75.0, "f1": pytest.approx(600 / 7)}  # of duplicate: precision 3/4, recall 1
    pairs = [{"premise": "a", "hypothesis": "b", "label": label} for label in (1, 0)]
    task = glue(tmp_path, "mnli", pairs)
    assert evaluate_model(Oracle(task.labels, lambda _: 0), task).values == {"accuracy": 50.0, "accuracy_mm": 0.0}


def test_label_order():
    def order(model_labels, task_labels):
        config = SimpleNamespace(id2label=dict(enumerate(model_labels)), num_labels=len(model_labels))
        return label_order(config, SimpleNamespace(name="t", labels=task_labels, names_by_id=None))

    assert order(["b", "a"], ["a", "b"]) == [1, 0]
    assert order(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ["entailment", "neutral", "contradiction"]) == [2, 1, 0]
    eleven = [f"LABEL_{number}" for number in range(11)]
    assert order(eleven, sorted(eleven)) == [0, 1, 10, *range(2, 10)]  # they are really called so
    assert order(["a", "A"], ["A", "a"]) == [1, 0]
    with pytest.raises(InputError, match="model's labels are x, y, the task's a, b"):
        order(["x", "y"], ["a", "b"])
    with pytest.raises(InputError, match="LABEL_0, LABEL_1, LABEL_2, the task's a, b"):
        order(["LABEL_0", "LABEL_1", "LABEL_2"], ["a", "b"])


def test_classes_without_names_are_not_guessed(capsys):
    def order(count, name, task_labels, by_id=None):
        names = [f"LABEL_{index}" for index in range(count)]
        config = SimpleNamespace(id2label=dict(enumerate(names)), num_labels=count)
        return label_order(config, SimpleNamespace(name=name, labels=task_labels, names_by_id=by_id))

    evaluation._say.cache_clear()
    for labels in (["a", "b"], ["1", "2"], ["0", "2"], ["1", "0"]):
        with pytest.raises(
            InputError, match=r"no names \(LABEL_0, LABEL_1\), and which .* the data's .*; name them in"
        ):
            order(2, "t", labels)
    assert capsys.readouterr().err == ""
    assert order(2, "qnli", ["entailment", "not_entailment"]) == [0, 1]
    assert order(2, "qnli", ["entailment", "not_entailment"]) == [0, 1]
    said = "the model's classes have no names, they are taken in the task's order: LABEL_0 = "
    assert capsys.readouterr().err == f"tasks.qnli: {said}entailment, LABEL_1 = not_entailment\n"
    assert order(3, "t", ["0", "1", "2"]) == [0, 1, 2]
    assert capsys.readouterr().err == f"tasks.t: {said}0, LABEL_1 = 1, LABEL_2 = 2\n"
    # The data's file says which id is which name, in an order of its own.
    assert order(3, "t", ["bad", "fine", "good"], by_id=["good", "bad", "fine"]) == [1, 2, 0]
    assert "taken as the ids of the data's: LABEL_0 = good, LABEL_1 = bad, " in capsys.readouterr().err


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_folder_of_a_classifier(tmp_path, own, architecture):
    labels = {"id2label": {0: "good", 1: "bad", 2: "fine"}, "label2id": {"good": 0, "bad": 1, "fine": 2}}
    if architecture == "bert":
        model = tiny_bert(BertForSequenceClassification, num_labels=3, **labels)
    else:
        model = tiny_distilbert(DistilBertForSequenceClassification, num_labels=3, **labels)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 1.0])  # always "fine", which is id 1 in the data
    folder = save(model, tmp_path / architecture)
    assert evaluate(folder, "mine", own) == {"accuracy": pytest.approx(100 / 3), "f1": pytest.approx(100 / 6)}
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text(encoding="utf-8").splitlines()]
    write(tmp_path / "fine.jsonl", [row for row in lines if row["label"] == "fine"])
    only = own.model_copy(update={"validation": str(tmp_path / "fine.jsonl")})
    assert evaluate(folder, "mine", only, precision="bf16")["accuracy"] == 100.0


def test_a_folder_without_tokenizer_is_not_evaluated(tmp_path, own):
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    tiny_bert(BertForSequenceClassification, num_labels=3, **labels).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="no tokenizer in it: got neither tokenizer.json nor vocab.txt"):
        evaluate(tmp_path / "model", "mine", own)


def test_rows_are_counted_and_the_whole_file_is_for_the_asking(tmp_path, own, capsys):
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    folder = save(tiny_bert(BertForSequenceClassification, num_labels=3, **labels), tmp_path / "model")
    spec = own.model_copy(update={"validation": None})
    evaluate(folder, "mine", spec, whole=True)
    assert "evaluate mine: 60 rows\n" in capsys.readouterr().err
    evaluate(folder, "mine", spec)
    assert "evaluate mine: 60 rows\n" not in capsys.readouterr().err
    with pytest.raises(InputError, match="max_length is 48 but the model has 40 positions"):
        model = tiny_bert(BertForSequenceClassification, num_labels=3, max_position_embeddings=40, **labels)
        evaluate(save(model, tmp_path / "short"), "mine", own.model_copy(update={"max_length": 48}))


@pytest.mark.parametrize(
    "build", [(tiny_bert, BertForQuestionAnswering), (tiny_distilbert, DistilBertForQuestionAnswering)]
)
def test_folder_of_a_question_answering_model(tmp_path, build):
    make, cls = build
    context = "the river was great and the city was not"
    answers = {"text": ["river"], "answer_start": [4]}
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [{"id": "1", "question": "what", "context": context, "answers": answers}])
    folder = save(make(cls), tmp_path / "model")
    result = evaluate(folder, "squad", recipe.Task(data=str(tmp_path), max_length=48, stride=8))
    assert set(result) == {"exact_match", "f1"}


@pytest.mark.parametrize("before", [0, 12, 24])
def test_answer_comes_from_the_best_window(tmp_path, before):
    context = "the game " * before + "king " + "the music " * (24 - before)
    answers = {"text": ["king"], "answer_start": [context.index("king")]}
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [{"id": "1", "question": "who", "context": context, "answers": answers}])
    tokenizer = tiny_tokenizer()
    king = tokenizer.convert_tokens_to_ids("king")

    class Finder(Oracle):
        def forward(self, input_ids, attention_mask):
            score = (input_ids == king).float() * 5
            return SimpleNamespace(start_logits=score, end_logits=score)

    spec = recipe.Task(data=str(tmp_path), max_length=32, stride=4)
    task = load_task("squad", spec, tokenizer)
    assert len(task.evaluations[""]) > 1
    assert evaluate_model(Finder(["a"], None), task).values == {"exact_match": 100.0, "f1": 100.0}


def test_folder_without_a_trained_head_is_refused(tmp_path, own):
    for cls, kind, weight in (
        (BertModel, "classification", "classifier.weight"),
        (BertForMaskedLM, "qa", "qa_outputs.weight"),
        (BertForQuestionAnswering, "classification", "classifier.weight"),
    ):
        folder = save(tiny_bert(cls), tmp_path / f"{cls.__name__}-{kind}")
        with pytest.raises(InputError, match=r"not fine-tuned for .* are missing; make a task model") as error:
            load_task_model(folder, kind)
        assert weight in str(error.value)


def test_unreadable_folders(tmp_path, own):
    with pytest.raises(InputError, match="nothing: no such folder"):
        evaluate(tmp_path / "nothing", "mine", own)
    folder = tmp_path / "cut"
    save(tiny_bert(BertForSequenceClassification), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="not a loadable model folder"):
        evaluate(folder, "mine", own)


@pytest.mark.parametrize("engine", [False, True])
def test_names_are_not_matched_to_a_model_without_any(tmp_path, own, capsys, engine):
    folder = save(tiny_bert(BertForSequenceClassification, num_labels=3), tmp_path / "model")
    with pytest.raises(InputError, match=r"no names \(LABEL_0, .*the data's bad, fine, good is unknown; name them in"):
        evaluate(folder, "mine", own, engine=engine)
    task = load_task("mine", own, tiny_tokenizer())
    with pytest.raises(InputError, match=r"tasks\.mine: the model's classes have no names"):  # as a teacher
        transfer_objective(str(folder), str(folder), Losses(hard=0.0, kd=1.0, hidden=0.0, temperature=2.0), task)
    with pytest.raises(InputError, match=r"tasks\.mine: the model's classes have no names"):  # to be quantized
        task_student(str(folder), task)
    write(tmp_path / "d.jsonl", [{"text": f"film {row % 3}", "label": row % 3} for row in range(60)])
    assert "accuracy" in evaluate(folder, "mine", own, engine=engine)
    said = "labels 0, 1, 2 of the validation rows are taken as class ids: 0 = LABEL_0, 1 = LABEL_1, 2 = LABEL_2\n"
    assert capsys.readouterr().err.count(said) == 1


def test_other_labels_are_refused(tmp_path, own):
    labels = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}
    folder = save(tiny_bert(BertForSequenceClassification, **labels), tmp_path / "model")
    with pytest.raises(InputError, match="label 'bad' in validation row 1 is unknown; wanted one of x, y"):
        evaluate(folder, "mine", own)
    write(tmp_path / "train.jsonl", [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}])
    write(tmp_path / "validation.jsonl", [{"sentence": "a", "label": 0}])
    with pytest.raises(InputError, match=r"tasks.sst2: the model's labels are x, y, the task's negative, positive"):
        evaluate(folder, "sst2", recipe.Task(data=str(tmp_path), max_length=16))
