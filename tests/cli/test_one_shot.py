"""`pruneofa prune --one-shot`: from the rows of a task to a sparse encoder without training, and on to the task."""

import json

import numpy as np
import pytest
from transformers import BertModel

from pruneofa import Engine
from pruneofa.formats.cache import write_checksums
from pruneofa.train import device, layerwise
from tests.small import write_task
from tests.tiny import half_pruned, modules_json, tiny_bert, write_model

FEW = {"hessian": ("--prune.calibration", 32), "magnitude": (), "fisher": ("--prune.gradients", 16)}
FEW["obs"] = FEW["fisher"]


@pytest.fixture
def prune(call, tmp_path, monkeypatch):
    """`pruneofa prune model out --one-shot` on the texts of a task, with further options."""
    write_model(tmp_path / "model")
    write_task(tmp_path / "task.csv")
    monkeypatch.chdir(tmp_path)
    text = ("--corpus.source", "task.csv", "--corpus.column", "sentence", "--corpus.max-length", 32)

    def pruned(*options, score="hessian"):
        given = (*(() if score == "hessian" else ("--prune.score", score)), *FEW[score], "--precision", "fp32")
        return call("prune", "model", "out", "--one-shot", *text, *given, *options)

    return pruned


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


@pytest.mark.parametrize("teacher", [False, True])
def test_an_embedder_stays_one_and_its_task_models_are_none(prune, call, tmp_path, teacher):
    model = tmp_path / "model"
    half_pruned(tiny_bert(BertModel), noise=0.2).save_pretrained(model)
    files = {
        "modules.json": [
            {"path": path, "type": f"sentence_transformers.{path[2:] or 'Transformer'}"} for path in ("", *MODULES)
        ],
        "1_Pooling/config.json": {"pooling_mode": "mean"},
        "config_sentence_transformers.json": {"prompts": {"query": "good "}, "default_prompt_name": "query"},
        "sentence_bert_config.json": {"max_seq_length": 12},
    }
    for name, content in files.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(json.dumps(content))
    if teacher:
        text = ("--corpus.source", "task.csv", "--corpus.column", "sentence", "--corpus.max-length", 32)
        steps = ("--prune.steps", 4, "--prune.batch", 8, "--teacher.steps", 2, "--teacher.batch", 8)
        said = call("prune", "model", "out", *text, *steps, "--prune.final", 0.55, "--precision", "fp32")
    else:
        said = prune("--prune.final", 0.55)
    assert said.code == 0, said.err
    for folder in ("out", "out-teacher") if teacher else ("out",):
        engine = Engine.from_pretrained(folder)
        assert (engine.task, engine.tokenizer.limit) == ("embedding", 12)
        vectors = engine.predict(["a river", "the king"])
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
        assert np.array_equal(vectors, engine.predict(["a river", "the king"], batch_size=1))
        [architecture] = json.loads((tmp_path / folder / "config.json").read_text())["architectures"]
        assert architecture == ("BertForPreTraining" if teacher else "BertModel")  # no loss has trained its head
    task = ("--data", "task.csv", "--text", "sentence", "--label", "verdict", "--max-length", 32, "--epochs", 1)
    assert call("transfer", "out", "tuned", *task, "--precision", "fp32").code == 0
    assert call("verify", "out", "tuned").code == 0
    assert not [name for name in files if (tmp_path / "tuned" / name).exists()]


MODULES = ("1_Pooling", "2_Normalize")


def test_settings_that_cannot_be_kept_are_said_before_pruning(prune, tmp_path):
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules_json(Dense="2_Dense")))
    said = prune(score="magnitude")
    assert said.code == 0 and "the new model does not keep its settings of sentence-transformers: " in said.err
    assert not (tmp_path / "out" / "modules.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"]  # its head is that of the model


@pytest.mark.parametrize("score", ["magnitude", "fisher", "obs", "hessian"])
def test_every_score_and_steps_that_follow(prune, call, tmp_path, score):
    options = ["--prune.scope", "global", "--prune.pattern", "4x1", "--prune.final", 0.75]
    steps = ["--prune.steps", 2, "--prune.batch", 8] if score == "obs" else []
    said = prune(*options, *steps, "--json", score=score)
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
        (["--teacher.steps", 3], "--teacher.steps was given, but --one-shot prepares none; omit it"),
        (["--prune.interval", 3], "--prune.interval was given, but all weights are pruned at once; omit it"),
        (["--prune.lr", 1e-3], "--prune.lr was given, but --prune.steps is 0, so nothing is trained; omit it"),
        (["--prune.block", 9], "--prune.block was given, but only --prune.score obs reads it; omit it"),
        (["--distill.temperature", 3], "--distill.temperature was given, but --distill.kd is 0; omit it"),
        (
            ["--prune.save-steps", 5],
            "--prune.steps is 0, so nothing is trained; omit it",
        ),
        (
            ["--prune.one-shot", "false"],
            "but --one-shot prunes at once; omit one of them",
        ),
        (["--prune.pattern", "2:4"], "final is 0.9 but pattern 2:4 gives 0.5; set --prune.final to that"),
        (["--corpus.config", "en"], "but only hub data sets have one, not local files; omit it"),
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
    said = prune(score=score)
    assert said.code == 2
    assert f"prune.score {score}" in said.err and "this machine has 0.0 GB free; lower --prune." in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "task.csv"]


def test_the_fit_of_layers_as_selections_of_gradual_pruning(call, prune, tmp_path):
    """`prune` is here for the files that it makes."""
    options = ["--prune.score", "hessian", "--prune.one-shot", "false", "--prune.steps", 10, "--prune.interval", 2]
    text = ["--corpus.source", "task.csv", "--corpus.column", "sentence", "--corpus.max-length", 32]
    more = ["--corpus.nsp", "false", "--prune.batch", 4, "--prune.calibration", 32, "--prune.lr", 1e-4]
    said = call("prune", "model", "out", "--no-teacher", *text, *options, *more, "--precision", "fp32", "--json")
    assert said.code == 0, said.err
    assert json.loads(call("inspect", "out", "--json").out)["encoder"] == pytest.approx(0.9, abs=0.01)
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["settings"]["prune"]["one_shot"] is False and record["settings"]["prune"]["interval"] == 2


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--teacher.steps", "--no-teacher prepares none"),
        ("--prune.stop", "with --prune.score obs the last selection is at --prune.end"),
    ],
)
def test_options_that_gradual_pruning_does_not_read(refused, prune, option, reason):
    given = ["--corpus.source", "task.csv", "--no-teacher", "--prune.score", "obs", option, 90_000]
    assert f"{option} was given, but {reason}; omit it" in refused("prune", "model", "out", *given)


def test_steps_0_needs_one_shot(refused, prune):
    line = refused("prune", "model", "out", "--corpus.source", "task.csv", "--prune.steps", 0)
    assert "steps is 0 but pruning is gradual; raise steps, or set --prune.one-shot" in line
