"""`evaluate` by the engine, of packed folders and others; by torch it is in test_verbs.py."""

import json
import shutil

import pytest
from transformers import BertForSequenceClassification

from pruneofa.formats.pack import pack
from tests.small import write_task
from tests.tiny import tiny_bert, write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A classifier, the same packed, and the options that name its data."""
    root = tmp_path_factory.mktemp("evaluate")
    labels = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    model = write_model(root / "model", tiny_bert(BertForSequenceClassification, initializer_range=0.5, **labels))
    for precision in ("int8", "fp32"):
        pack(model, root / precision, precision=precision)
    data = write_task(root / "task.csv")
    return root, ["--data", data, "--text", "sentence", "--label", "verdict", "--max-length", "32"]


def test_a_packed_folder(made, call):
    root, data = made
    said = call("evaluate", root / "int8", *data, "--isa", "scalar", "--threads", "1", "--json")
    assert said.code == 0, said.err
    assert set(json.loads(said.out)) == {"accuracy", "f1"}
    assert "evaluate custom: 96 rows, by the engine in int8 on scalar\n" in said.err


def test_the_same_numbers_from_torch_and_the_engine(made, call):
    root, data = made
    by_torch = call("evaluate", root / "model", *data, "--json")
    assert by_torch.code == 0 and "engine" not in by_torch.err, by_torch.err
    wanted = json.loads(by_torch.out)
    assert 0 < wanted["accuracy"] < 100
    for arguments in ([root / "model", "--engine"], [root / "fp32"]):
        said = call("evaluate", *arguments, *data, "--precision", "fp32", "--json")
        assert said.code == 0 and "by the engine in fp32 on " in said.err, said.err
        assert json.loads(said.out) == wanted
    said = call("evaluate", root / "fp32", *data)
    assert said.code == 0 and "by the engine in int8 on " in said.err and "accuracy" in said.out


def test_a_hub_id_is_looked_at_where_its_snapshot_lies(made, call, tmp_path, monkeypatch):
    root, data = made
    for name in ("int8", "model"):
        repository = tmp_path / f"models--org--{name}"
        shutil.copytree(root / name, repository / "snapshots" / "0")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        (repository / "snapshots" / "0" / ".gitattributes").touch()  # as a snapshot that is whole
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # the variable was read at import
    monkeypatch.setenv("PRUNEOFA_ISA", "scalar")
    for name, how in (("int8", ", by the engine in int8 on scalar"), ("model", "")):
        said = call("evaluate", f"org/{name}", *data, "--json")
        assert said.code == 0, said.err
        assert f"evaluate custom: 96 rows{how}\n" in said.err
        assert set(json.loads(said.out)) == {"accuracy", "f1"}


def test_what_does_not_fit_is_one_line(made, refused, tmp_path):
    root, data = made
    assert "packed as int8" in refused("evaluate", root / "int8", *data, "--precision", "fp32")
    assert "add --engine" in refused("evaluate", root / "model", *data, "--precision", "int8")
    assert "add --engine" in refused("evaluate", root / "model", *data, "--threads", "1")
    assert "isa is 'sse'" in refused("evaluate", root / "int8", *data, "--isa", "sse")
    assert "threads is 0, wanted" in refused("evaluate", root / "int8", *data, "--threads", "0")
    squad = ["--task", "squad", "--data", tmp_path]
    assert "head is for classification, --task squad needs" in refused("evaluate", root / "int8", *squad)
    assert "--precision" in refused("evaluate", root / "int8", *data, "--precision", "int4")
