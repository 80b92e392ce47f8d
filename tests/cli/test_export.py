"""`export` as a user calls it; what is exported is tested in tests/export."""

import importlib.util
import json

import pytest
from transformers import BertForSequenceClassification

from pruneofa.export import compressed as export_compressed
from pruneofa.export import export as module
from tests.quantized import quantize_folder
from tests.small import write_task
from tests.tiny import tiny_bert, write_model

needs_compressed = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed_tensors not installed: NOT TESTED here"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An int8 classifier and the options that name its data."""
    root = tmp_path_factory.mktemp("export")
    labels = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    folder = write_model(root / "model", tiny_bert(BertForSequenceClassification, initializer_range=0.2, **labels))
    quantize_folder(folder)
    return folder, ["--data", write_task(root / "task.csv"), "--text", "sentence", "--label", "verdict",
                    "--max-length", "32"]  # fmt: skip


@needs_compressed
def test_the_report(made, call, tmp_path):
    folder, data = made
    said = call("export", folder, tmp_path / "out", "--to", "compressed-tensors", *data)
    assert said.code == 0, said.err
    assert "accuracy (torch, exported)" in said.out and "zeros (before, after, lost)" in said.out
    said = call("export", folder, tmp_path / "again", "--to", "compressed-tensors", "--json")
    assert json.loads(said.out) == json.loads((tmp_path / "again" / "export.json").read_text())
    assert "Compressing" not in said.err and "torchvision" not in said.err


@needs_compressed
def test_a_worse_export_is_exit_1(made, call, tmp_path, monkeypatch):
    monkeypatch.setattr(export_compressed, "_SHIFT", 120)
    said = call("export", made[0], tmp_path / "out", "--to", "compressed-tensors", "--json")
    assert said.code == 1
    [failure] = json.loads(said.out)["failures"]
    assert failure.startswith("outputs differ ") and said.err.endswith(f"pruneofa: failed: {failure}\n")
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_one_line(made, call, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(export_compressed, "MODULES", ())
    line = refused("export", made[0], tmp_path / "out", "--to", "compressed-tensors", "--precision", "fp32")
    assert line.startswith("compressed-tensors stores int8")
    assert "argument --to" in call("export", made[0], tmp_path / "out", "--to", "tflite").err
    assert "needs --data, --text and --label" in refused(
        "export", made[0], tmp_path / "out", "--to", "compressed-tensors", "--task", "mine"
    )


def test_a_missing_library_is_exit_3(made, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(module.export_onnx, "MODULES", ("not_there",))
    line = refused("export", made[0], tmp_path / "out", "--to", "onnx", code=3)
    assert line == "export --to onnx needs not-there: pip install 'pruneofa[onnx]'"
