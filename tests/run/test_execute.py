"""Evaluation is a step of its own: whatever becomes of it, the training is kept; begun work is not thrown away."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pruneofa import recipe
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats.files import read_json
from pruneofa.run import execute, fine_tuning, single
from pruneofa.run.run import run
from pruneofa.train import evaluate
from pruneofa.train.metrics import Measured
from tests.small import small_recipe, write_task
from tests.tiny import write_model

OPTIONS = {"data_root": None, "seed": 0, "precision": "fp32"}
SEED = "tasks/mine/seed-0"


@pytest.fixture
def transfer(tmp_path):
    """`pruneofa transfer` of a tiny model to tmp_path/out; the arguments are fields of the task."""
    model = write_model(tmp_path / "model")
    data = {"data": str(write_task(tmp_path / "t.csv")), "validation": str(write_task(tmp_path / "v.csv", 40, 1))}
    fixed = {"text": "sentence", "label": "verdict", "epochs": 1, "batch": 16, "max_length": 32, "kd": 0.0, "hard": 1.0}

    def called(name="mine", redo=False, **fields):
        spec = recipe.Task(**fixed | data | fields).resolved(name)
        return single.transfer(str(model), tmp_path / "out", name, spec, redo=redo, **OPTIONS)

    return called


def interrupt(*_, **__):
    raise KeyboardInterrupt


def weights(folder):
    file = folder / "model.safetensors"
    return file.read_bytes(), file.stat().st_mtime_ns


def test_interrupted_in_its_evaluation_the_training_is_kept(transfer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"{SEED}/transfer is trained"):
        patch.setattr(execute, "evaluate_model", interrupt)
        transfer()
    assert (out / "stage.json").exists() and not (out / "metrics.json").exists()
    trained = weights(out), read_json(out / "stage.json")
    monkeypatch.setattr(fine_tuning, "train", lambda *_, **__: pytest.fail("trained again"))
    metrics = transfer(validation_rows=10)
    assert metrics == read_json(out / "metrics.json") and metrics["accuracy"] % 10 == pytest.approx(0)
    assert (weights(out), read_json(out / "stage.json")) == trained
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {event["stage"] for event in events} == {f"{SEED}/transfer"}
    assert [event["event"] for event in events if event["event"] in ("done", "evaluated")] == ["done", "evaluated"]
    assert not (tmp_path / ".out.pruneofa-work").exists()


def test_a_model_that_diverged_is_said_when_its_metrics_are_written(transfer, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "evaluate_model", lambda *_, **__: Measured({"accuracy": 50.0, "loss": float("nan")}))
    with pytest.raises(CheckFailed, match=r"out/metrics\.json: loss is nan, wanted a finite number"):
        transfer()
    assert not (tmp_path / "out" / "metrics.json").exists() and not (tmp_path / "out" / "evaluation.json").exists()


def test_other_rows_are_evaluated_on_a_finished_folder_without_redo(transfer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    whole = transfer()
    before, record = weights(out), read_json(out / "evaluation.json")
    monkeypatch.setattr(fine_tuning, "train", lambda *_, **__: pytest.fail("trained again"))
    rows = []
    metrics_of = evaluate._metrics
    monkeypatch.setattr(
        evaluate, "_metrics", lambda task, *rest: rows.append(len(task.evaluations[""])) or metrics_of(task, *rest)
    )
    few = transfer(validation_rows=3)
    assert transfer(validation_rows=3) == few and rows == [3]  # the second time there was nothing to do
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert "log" in events and events.count("evaluated") == 2  # what training logged is still there
    assert read_json(out / "evaluation.json")["fingerprint"] != record["fingerprint"]
    assert transfer() == whole and rows == [3, 40]
    assert read_json(out / "evaluation.json")["fingerprint"] == record["fingerprint"]
    assert weights(out) == before
    with pytest.raises(InputError, match=rf"{SEED}/transfer \(lr was \S+, is 0.001\); --redo"):
        transfer(lr=1e-3)


def test_frozen_embeddings_keep_their_values_and_all_else_is_trained(transfer, tmp_path):
    transfer(freeze_embeddings=True, lr=1e-2)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert same == {"bert.embeddings.word_embeddings.weight"}


def test_an_evaluation_that_was_killed_while_it_was_written_is_made_again(transfer, tmp_path, monkeypatch):
    whole = transfer()
    write = execute.write_json

    def killed(path, value):
        if path.name == "evaluation.json":
            raise MemoryError
        write(path, value)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(execute, "write_json", killed)
        transfer(validation_rows=3)
    assert transfer() == whole  # and not what was measured on three rows


def test_in_a_run_only_the_evaluations_are_made_again(tmp_path, monkeypatch):
    settings = small_recipe(tmp_path / "data")
    run(settings, tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("model.safetensors")}
    records = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("stage.json")}
    changed = settings.model_copy(deep=True)
    changed.tasks["mine"].validation_rows = 7
    monkeypatch.setattr(fine_tuning, "train", lambda *_, **__: pytest.fail("trained again"))
    results = run(changed, tmp_path / "run")
    for variant in results["tasks"]["mine"]["accuracy"].values():
        assert variant["mean"] * 7 / 100 == pytest.approx(round(variant["mean"] * 7 / 100))
    assert before == {file: file.read_bytes() for file in before}
    assert records == {file: file.stat().st_mtime_ns for file in records}


def test_begun_work_with_other_settings_is_refused_until_redo(transfer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fine_tuning, "train", interrupt)
        transfer()
    work = tmp_path / ".out.pruneofa-work" / ".work" / SEED / "transfer"
    (work / "checkpoint-3").mkdir()
    with pytest.raises(InputError, match=rf"{SEED}/transfer \(unfinished\); --redo"):
        transfer(lr=1e-3)
    with pytest.raises(InputError, match=rf"contains {SEED}/transfer \(unfinished\).*delete it with --redo"):
        transfer("other")
    assert (work / "checkpoint-3").exists() and not (tmp_path / "out").exists()
    transfer(lr=1e-3, redo=True)
    assert read_json(tmp_path / "out" / "stage.json")["settings"]["lr"] == 1e-3
    assert not (tmp_path / ".out.pruneofa-work").exists()


def test_a_long_evaluation_is_announced_before_it_starts(transfer, monkeypatch, capsys):
    transfer()
    assert "inputs, about" not in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "evaluation_seconds", lambda *_, **__: 2280.0)
    started = []
    monkeypatch.setattr(evaluate, "_forward", lambda *_: started.append(capsys.readouterr().err) or iter(()))
    transfer(validation_rows=30)
    assert f"evaluate {SEED}/transfer: 30 inputs, about 38:00 (minutes:seconds)\n" in started[0]


def test_files_of_the_user_are_neither_deleted_nor_replaced(transfer, tmp_path):
    theirs = [tmp_path / ".out.work" / "notes", tmp_path / "out.old" / "notes", tmp_path / ".out.tmp" / "notes"]
    unmarked = tmp_path / ".out.pruneofa-work" / ".work" / SEED / "transfer" / "notes"
    for file in [*theirs, unmarked]:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    with pytest.raises(InputError, match=r"transfer: contains files, but no stage made it; move it away"):
        transfer()
    assert unmarked.read_text() == "mine" and not (tmp_path / "out").exists()
    unmarked.unlink()
    transfer()
    assert [file.read_text() for file in theirs] == ["mine"] * 3


def test_a_stage_of_a_run_does_not_replace_a_folder_that_no_stage_made(tmp_path):
    notes = tmp_path / "run" / "sparse" / "notes"
    settings = small_recipe(tmp_path / "data", "tasks={}")
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.dump(settings))
    with pytest.raises(InputError, match=r"sparse: contains files, but no stage made it"):
        run(settings, tmp_path / "run")
    assert notes.read_text() == "mine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_with_weights_that_are_not_finite_does_not_count(bad, transfer, tmp_path, monkeypatch):
    trained = fine_tuning.train

    def diverge(model, *arguments, **options):
        result = trained(model, *arguments, **options)
        with torch.no_grad():
            next(getattr(model, "student", model).parameters())[3, 4] = bad
        return result

    monkeypatch.setattr(fine_tuning, "train", diverge)
    with pytest.raises(CheckFailed, match=r"transfer: training diverged: model.safetensors: .*weight has 1 NaN or inf"):
        transfer()
    assert not (tmp_path / "out" / "stage.json").exists()
