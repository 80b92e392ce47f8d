"""`pruneofa prune --one-shot`: from the rows of a task to a sparse encoder without training, and on to the task."""

import json

import pytest

from pruneofa.formats.cache import write_checksums
from pruneofa.train import device, layerwise
from tests.small import write_task
from tests.tiny import write_model

FEW = ("--prune.gradients", 16, "--prune.calibration", 32, "--corpus.max-length", 32, "--precision", "fp32")


@pytest.fixture
def prune(call, tmp_path, monkeypatch):
    """`pruneofa prune model out --one-shot` on the texts of a task, with further options."""
    write_model(tmp_path / "model")
    write_task(tmp_path / "task.csv")
    monkeypatch.chdir(tmp_path)
    text = ("--corpus.source", "task.csv", "--corpus.column", "sentence")
    return lambda *options: call("prune", "model", "out", "--one-shot", *text, *FEW, *options)


def test_from_the_rows_of_a_task_to_a_task_model_with_the_same_zeros(prune, call, tmp_path):
    said = prune("--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["hidden"] > 0
    stage = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert stage["settings"]["prune"]["score"] == "hessian" and stage["settings"]["prune"]["steps"] == 0
    assert 0 < stage["tokens"] <= 32 * 32 and stage["seconds"] > 0
    found = json.loads(call("inspect", "out", "--json").out)
    assert found["encoder"] == pytest.approx(0.9, abs=0.01)
    again = prune("--json")
    assert again.code == 0 and "gradients" not in again.err and json.loads(again.out) == json.loads(said.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "task.csv"]
    task = ("--data", "task.csv", "--text", "sentence", "--label", "verdict", "--max-length", 32, "--epochs", 1)
    assert call("transfer", "out", "tuned", *task, "--precision", "fp32").code == 0
    assert call("verify", "out", "tuned").code == 0


@pytest.mark.parametrize("score", ["magnitude", "fisher", "obs"])
def test_other_scores_and_steps_that_follow(prune, call, tmp_path, score):
    options = ["--prune.score", score, "--prune.scope", "global", "--prune.pattern", "4x1", "--prune.final", 0.75]
    steps = ["--prune.steps", 2, "--prune.batch", 8] if score == "obs" else []
    said = prune(*options, *steps, "--json")
    assert said.code == 0, said.err
    assert json.loads(call("inspect", "out", "--json").out)["encoder"] == pytest.approx(0.75, abs=0.06)
    tokens = json.loads((tmp_path / "out" / "stage.json").read_text())["tokens"]
    assert (tokens > 0) is (score != "magnitude")


def test_after_ctrl_c_the_same_command_finishes(prune, monkeypatch, tmp_path):
    fit, fitted = layerwise._fit_linear, []

    def interrupt(*arguments):
        if len(fitted) == 6:  # in the second layer
            raise KeyboardInterrupt
        fitted.append(fit(*arguments))

    with monkeypatch.context() as patched:
        patched.setattr(layerwise, "_fit_linear", interrupt)
        assert prune().code == 130
    assert not (tmp_path / "out").exists()
    [clock] = (tmp_path / ".out.pruneofa-work").rglob("layer-0/clock.json")
    clock.write_text('{"seconds": 1000}')
    write_checksums(clock.parent)
    said = prune()
    assert said.code == 0, said.err
    assert 1000 < json.loads((tmp_path / "out" / "stage.json").read_text())["seconds"] < 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher.steps", 3], "--teacher.steps was given, but --one-shot prepares no teacher; omit one of them"),
        (["--prune.scope", "global"], "score hessian prunes layer by layer; set scope to uniform"),
        (["--prune.pattern", "2:4"], "final is 0.9 but pattern 2:4 gives 0.5; set --prune.final to that"),
        (["--corpus.column", "text"], "task.csv: no column 'text', it has sentence, verdict; set --corpus.column"),
    ],
)
def test_what_is_refused(prune, tmp_path, options, message):
    said = prune(*options)
    assert said.code == 2 and said.err.splitlines()[-1].endswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("score", ["obs", "hessian"])
def test_more_memory_than_there_is_is_refused_before_anything_is_written(prune, monkeypatch, tmp_path, score):
    monkeypatch.setattr(device, "free_memory", lambda: (1000, "this machine"))
    said = prune("--prune.score", score)
    assert said.code == 2
    assert f"prune.score {score}" in said.err and "this machine has 0.0 GB free; lower --prune." in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "task.csv"]


def test_steps_0_needs_one_shot(refused, prune):
    line = refused("prune", "model", "out", "--corpus.source", "task.csv", "--prune.steps", 0)
    assert "steps is 0 but pruning is gradual; raise steps, or set one_shot: true" in line
