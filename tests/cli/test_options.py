"""Options that are generated from the recipe, their names in messages, and the precision of the training verbs."""

import argparse
import json

import pytest

from pruneofa import recipe
from pruneofa.cli import main as cli
from pruneofa.cli.options import add_fields, read_fields, with_option_names
from pruneofa.formats.files import read_json
from tests.tiny import tiny_bert, write_model

OWN = ["--data", "d.csv", "--text", "sentence", "--label", "verdict"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model in the working folder, where a single verb finds `model` and writes to `out`."""
    write_model(tmp_path / "model", tiny_bert())
    monkeypatch.chdir(tmp_path)
    return "model"


@pytest.mark.parametrize("verb", ["transfer", "quantize", "prune"])
@pytest.mark.parametrize("given", [None, "bf16", "fp32"])
def test_the_precision_is_that_of_the_processor_unless_it_is_given(model, call, monkeypatch, tmp_path, verb, given):
    from pruneofa.run import single

    found = []

    def stage(*arguments, **settings):
        found.append(settings["precision"] if "precision" in settings else arguments[0].precision)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "evaluation.json").write_text(json.dumps({"rows": {"": 40}}))
        return {"accuracy": 50.0}

    monkeypatch.setattr(single, verb, stage)
    chosen = ["--precision", given] if given else []
    (tmp_path / "text.txt").write_text("the king")
    rest = ["--corpus.source", "text.txt"] if verb == "prune" else OWN
    for fast in ("bf16", "fp32"):
        monkeypatch.setattr("pruneofa.train.device.fast_precision", lambda fast=fast: fast)
        assert call(verb, model, "out", *rest, *chosen).code == 0
    assert found == ([given, given] if given else ["bf16", "fp32"])


def help_of(model, prefix=""):
    parser = argparse.ArgumentParser()
    add_fields(parser, model, prefix)
    return parser, " ".join(parser.format_help().split())


def test_help_shows_choices_and_one_spelling_and_defaults_without_a_teacher(call):
    _, text = help_of(recipe.Quantize)
    assert "--activations {static,dynamic}" in text and "--observer {minmax,percentile}" in text
    parser, text = help_of(recipe.Task)
    assert "--train-rows TRAIN_ROWS" in text and "--train_rows" not in text
    for spelling in ("--train-rows", "--train_rows"):
        assert read_fields(parser.parse_args([spelling, "7"]), recipe.Task, "") == {"train_rows": 7}
    assert "(default: 0; without a teacher 1)" in text and "(default: 1; without a teacher 0)" in text
    parser, text = help_of(recipe.Corpus, "corpus.")
    assert "--corpus.max-length" in text and "--corpus.max_length" not in text
    assert read_fields(parser.parse_args(["--corpus.nsp"]), recipe.Corpus, "corpus.") == {"nsp": True}


@pytest.mark.parametrize("arguments", [["transfer", "x", "y", "--epoch", "3"], ["inspect", "x", "--eng"], ["--vers"]])
def test_no_option_can_be_abbreviated(refused, arguments):
    assert "unrecognized" in refused(*arguments) or arguments == ["--vers"]


def options(**given):
    known = dict.fromkeys(
        ("text", "label", "data", "validation", "epochs", "skip_bad_answers", "data_root", "observer")
    )
    return argparse.Namespace(**known | {"task": None} | given)


@pytest.mark.parametrize(
    ("task", "message", "wanted"),
    [
        (None, "tasks.custom: no label column 'x'; set tasks.custom.label", "no label column 'x'; set --label"),
        (None, "recipe: tasks.custom.epochs is 'ten': input", "--epochs is 'ten': input"),
        (
            None,
            "tasks.custom: d.csv: no such file; check tasks.custom.data, tasks.custom.validation and data_root",
            "d.csv: no such file; check --data, --validation and --data-root",
        ),
        (
            "squad",
            "tasks.squad: bad; set tasks.squad.skip_bad_answers=true",
            "--task squad: bad; set --skip-bad-answers",
        ),
        (None, "recipe: quantize.observer is 'x'", "--observer is 'x'"),
        (None, "runs/tasks.custom.text: no such file", "runs/tasks.custom.text: no such file"),
        (None, "tasks.custom.other is unknown", "tasks.custom.other is unknown"),
    ],
)
def test_messages_of_single_verbs_name_options(task, message, wanted):
    assert with_option_names(message, options(task=task)) == wanted
    assert with_option_names(message, options(task=task, set=[])) == message


def test_a_message_of_prune_names_its_options():
    given = argparse.Namespace(**{"corpus.nsp": None, "corpus.column": None, "data_root": None})
    assert with_option_names("set corpus.nsp=false", given) == "set --corpus.nsp false"
    assert with_option_names("check corpus.column (and data_root)", given) == "check --corpus.column (and --data-root)"


def test_a_wrong_column_is_said_with_the_options_names(model, call, tmp_path):
    (tmp_path / "d.csv").write_text("sentence,verdict\n" + "the king,good\nthe queen,bad\n" * 20)
    said = call("transfer", model, "out", *OWN[:-1], "stars", "--max-length", "32")
    assert said.code == 2
    line = said.err.splitlines()[-1]
    assert line == "pruneofa: error: no label column 'stars' among 'sentence', 'verdict'; set --label"
    said = call("evaluate", model, "--data", "none.csv", *OWN[2:], "--max-length", "32")
    assert (
        "none.csv: no such file; check --data, --validation and --data-root" in said.err or "not fine-tuned" in said.err
    )


def test_rows_that_are_held_out_are_counted_and_said(model, call, tmp_path):
    rows = "".join(f"the king {index},{'good' if index % 2 else 'bad'}\n" for index in range(60))
    (tmp_path / "d.csv").write_text("sentence,verdict\n" + rows)
    said = call("transfer", model, "out", *OWN, "--max-length", "32", "--epochs", "1", "--precision", "fp32")
    assert said.code == 0, said.err
    held_out = read_json(tmp_path / "out" / "evaluation.json")["rows"][""]
    assert 0 < held_out < 20
    assert f"no --validation: {held_out} of 60 rows held out\n" in said.err
    lines = {line.split()[0]: line for line in said.out.splitlines()}
    assert set(lines) == {"out", "accuracy", "f1"}
    assert lines["accuracy"].endswith(f" % of {held_out} rows")


def test_offline_is_set_before_a_verb_looks_for_its_model(refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **_: asked.append(name) or (_ for _ in ()).throw(OSError("nothing in the cache")),
    )
    line = refused("inspect", "no-such-model", "--offline")
    assert asked == ["no-such-model"]
    assert line.startswith("no-such-model: no such folder in ") and "--offline" in line
    assert "offline" not in cli.LOCAL
