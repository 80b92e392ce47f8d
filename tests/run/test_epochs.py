"""What each epoch gave: the metrics after every epoch, on training rows that are held out."""

import dataclasses
import json

import pytest

from pruneofa import recipe
from pruneofa.data.tasks import load_task
from pruneofa.errors import InputError
from pruneofa.formats.files import read_json
from pruneofa.run import fine_tuning, single
from pruneofa.train.evaluate import evaluate_model, load_task_model
from pruneofa.train.models import load_tokenizer
from tests.data.task_files import write
from tests.small import write_task
from tests.tiny import tiny_tokenizer, write_model

EPOCHS = 3


def spec_of(folder, **fields):
    files = {"data": str(folder / "t.csv"), "validation": str(folder / "v.csv"), "text": "sentence", "label": "verdict"}
    sizes = {"epochs": EPOCHS, "batch": 16, "max_length": 32, "kd": 0.0, "hard": 1.0, "lr": 1e-3}
    return recipe.Task(**files | sizes | fields).resolved("mine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("epochs")
    write_model(root / "model")
    write_task(root / "t.csv", rows=160)
    write_task(root / "v.csv", 40, 1)
    return root


def transfer(folder, out, **fields):
    options = {"data_root": None, "seed": 0, "precision": "fp32"}
    return single.transfer(str(folder / "model"), out, "mine", spec_of(folder, **fields), **options)


def test_the_rows_are_held_out_of_training_and_are_others_than_those_of_validation(folder):
    whole = load_task("mine", spec_of(folder), tiny_tokenizer())
    task = load_task("mine", spec_of(folder, check_epochs=True), tiny_tokenizer())
    assert whole.epoch_rows is None and task.evaluation_fingerprint == whole.evaluation_fingerprint
    texts = [set(data.rows.column("sentence").to_pylist()) for data in (task.train, task.epoch_rows, whole.train)]
    assert texts[0] and texts[1] and not texts[0] & texts[1] and texts[0] | texts[1] == texts[2]
    alone = spec_of(folder, check_epochs=True, validation=None)
    task = load_task("mine", alone, tiny_tokenizer())
    validation = set(task.evaluations[""].rows.column("sentence").to_pylist())
    assert not validation & set(task.epoch_rows.rows.column("sentence").to_pylist())


def test_every_epoch_is_evaluated_and_recorded(folder, tmp_path):
    transfer(folder, tmp_path / "out", check_epochs=True)
    epochs = read_json(tmp_path / "out/stage.json")["epochs"]
    assert len(epochs) == EPOCHS and all(0 <= epoch["accuracy"] <= 100 for epoch in epochs)
    task = load_task("mine", spec_of(folder, check_epochs=True), load_tokenizer(tmp_path / "out"))
    saved = load_task_model(tmp_path / "out", "classification")
    assert evaluate_model(saved, dataclasses.replace(task, evaluations={"": task.epoch_rows})).values == epochs[-1]
    events = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [(event["epoch"], event["metrics"]) for event in events if event["event"] == "epoch"] == [
        (number, metrics) for number, metrics in enumerate(epochs, 1)
    ]
    transfer(folder, tmp_path / "plain")
    assert "epochs" not in read_json(tmp_path / "plain/stage.json")


def test_evaluating_changes_no_weight_and_a_kill_loses_no_epoch(folder, tmp_path, monkeypatch):
    transfer(folder, tmp_path / "out", check_epochs=True)
    train = fine_tuning.train

    def without(*args, **options):
        quiet = [each for each in options["callbacks"] if not isinstance(each, fine_tuning.EpochCallback)]
        return train(*args, **options | {"callbacks": quiet})

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "train", without)
        transfer(folder, tmp_path / "quiet", check_epochs=True)
    wanted = (tmp_path / "out/model.safetensors").read_bytes()
    assert (tmp_path / "quiet/model.safetensors").read_bytes() == wanted

    class Killed(fine_tuning.EpochCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 * self.steps + 1:  # in the third epoch; the newest checkpoint is of the second
                raise MemoryError("killed")

    monkeypatch.setattr(fine_tuning, "train", lambda *args, **options: train(*args, **options | {"save_steps": 4}))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(fine_tuning, "EpochCallback", Killed)
        transfer(folder, tmp_path / "killed", check_epochs=True)
    transfer(folder, tmp_path / "killed", check_epochs=True)
    assert (tmp_path / "killed/model.safetensors").read_bytes() == wanted
    records = [read_json(tmp_path / name / "stage.json")["epochs"] for name in ("out", "killed")]
    assert records[0] == records[1]


def test_too_few_rows_are_named(folder, tmp_path):
    with pytest.raises(InputError) as error:
        load_task("mine", spec_of(folder, check_epochs=True, train_rows=2), tiny_tokenizer())
    wanted = "tasks.mine: 2 rows are too few to hold out one in 10; set tasks.mine.check_epochs=false"
    assert str(error.value) == wanted


def qa_row(number, start):
    context = f"a film {number}"
    answers = {"text": ["film"], "answer_start": [start]} if start is not None else {"text": [], "answer_start": []}
    return {"id": f"q{number}", "question": "what", "context": context, "answers": answers}


def test_held_out_questions_without_an_answer_are_skipped_as_in_training(tmp_path):
    rows = [qa_row(number, None if number % 3 == 0 else 9 if number % 3 == 1 else 2) for number in range(120)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", [qa_row(0, 2)])
    spec = recipe.Task(data=str(tmp_path), max_length=48, stride=8, check_epochs=True, skip_bad_answers=True)
    task = load_task("squad", spec, tiny_tokenizer())
    used = [set(data.rows.column("id").to_pylist()) for data in (task.train, task.epoch_rows)]
    assert used[0] and used[1] and not used[0] & used[1]
    assert used[0] | used[1] == {f"q{number}" for number in range(2, 120, 3)}
    with pytest.raises(InputError, match=r"answers are not found .*; set tasks\.squad\.skip_bad_answers=true"):
        load_task("squad", spec.model_copy(update={"skip_bad_answers": False}), tiny_tokenizer())


def test_epochs_of_question_answering_have_its_metrics(tmp_path):
    write_model(tmp_path / "model")
    write(tmp_path / "train.jsonl", [qa_row(number, 2) for number in range(40)])
    write(tmp_path / "validation.jsonl", [qa_row(0, 2)])
    spec = recipe.Task(
        data=str(tmp_path), max_length=32, stride=4, check_epochs=True, epochs=2, batch=8, kd=0.0, hard=1.0
    ).resolved("squad")
    options = {"data_root": None, "seed": 0, "precision": "fp32"}
    single.transfer(str(tmp_path / "model"), tmp_path / "out", "squad", spec, **options)
    epochs = read_json(tmp_path / "out/stage.json")["epochs"]
    assert [set(metrics) for metrics in epochs] == [{"exact_match", "f1"}] * 2


def test_mismatched_rows_of_mnli_are_no_part_of_the_epochs(tmp_path):
    write_model(tmp_path / "model")
    rows = [{"premise": f"a film {number}", "hypothesis": "a book", "label": number % 3} for number in range(60)]
    for split in ("train", "validation_matched", "validation_mismatched"):
        write(tmp_path / f"{split}.parquet", rows)
    spec = recipe.Task(
        data=str(tmp_path), max_length=16, check_epochs=True, epochs=1, batch=8, kd=0.0, hard=1.0
    ).resolved("mnli")
    task = load_task("mnli", spec, tiny_tokenizer())
    assert set(task.evaluations) == {"", "_mm"} and 0 < len(task.epoch_rows) < 20
    options = {"data_root": None, "seed": 0, "precision": "fp32"}
    single.transfer(str(tmp_path / "model"), tmp_path / "out", "mnli", spec, **options)
    record = read_json(tmp_path / "out/stage.json")
    assert [set(metrics) for metrics in record["epochs"]] == [{"accuracy"}]
