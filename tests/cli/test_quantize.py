"""`pruneofa quantize` on the task model of a small run."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from pruneofa import recipe
from pruneofa.cli import main as cli
from pruneofa.formats.files import read_json, write_json
from tests.cli.conftest import write_recipe

TEXT = ["--text", "sentence", "--label", "verdict"]
ONCE = ["--qat_epochs", "1", "--batch", "16"]
FAST = ["--max-length", "32", "--precision", "fp32"]
SEED = "run/tasks/mine/seed-0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    assert cli.main(["run", str(write_recipe(root)), "--out", str(root / "run")]) == 0
    return root


@pytest.fixture
def command(root, tmp_path):
    data = ["--data", root / "task.csv", "--validation", root / "validation.csv"]
    return ["quantize", root / SEED / "transfer", tmp_path / "out", *data, *TEXT, *FAST]


def last(said, code=2):
    assert said.code == code, said.err
    assert "Traceback" not in said.err and said.out == ""
    return said.err.splitlines()[-1]


def test_with_and_without_training(root, command, call, tmp_path):
    said = call(*command, "--ptq", "--json")
    assert said.code == 0, said.err
    assert "no --teacher" not in said.err and "89.97 % of its encoder's weights are zero" in said.err
    result = json.loads(said.out)
    assert result.pop("out") == str(tmp_path / "out")
    assert result == read_json(tmp_path / "out" / "metrics.json")
    assert {"quantization.json", "quantization.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert call("verify", root / "run" / "sparse", tmp_path / "out").code == 0
    assert call(*command, "--ptq", "--json").out == said.out
    assert "--redo" in last(call(*command, "--ptq", "--weights", "tensor"))

    taught = [*command[:2], tmp_path / "taught", *command[3:], "--teacher", root / SEED / "teacher"]
    said = call(*taught, *ONCE, "--activations", "dynamic", "--weights", "tensor", "--embeddings", "false")
    assert said.code == 0 and "no --teacher" not in said.err, said.err
    record = read_json(tmp_path / "taught" / "stage.json")
    assert record["settings"]["weights"] == "tensor" and record["inputs"]["teacher"]
    assert read_json(tmp_path / "taught" / "quantization.json")["embeddings"] is None
    assert call("verify", root / "run" / "sparse", tmp_path / "taught").code == 0
    assert "quantize" in (tmp_path / "taught" / "log.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taught"]


def test_without_a_teacher_it_says_so_and_learns_from_labels(command, call):
    said = call(*command, *ONCE, "--qat_lr", "1e-3")
    assert said.code == 0, said.err
    assert "no --teacher given: training on the labels only" in said.err


def test_evaluate_simulates_what_the_folder_says(root, command, call, tmp_path):
    assert call(*command, "--ptq").code == 0
    data = ["--data", root / "validation.csv", *TEXT, "--max-length", "32"]
    said = call("evaluate", tmp_path / "out", *data, "--json")
    assert said.code == 0 and "simulates the int8 arithmetic" in said.err, said.err
    assert json.loads(said.out) == read_json(tmp_path / "out" / "metrics.json")
    assert "simulates" not in call("evaluate", tmp_path / "out", *data, "--precision", "fp32").err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--ptq", "--teacher", "dense"], "--teacher was given, but --ptq does not train"),
        (["--ptq", "--batch", "8"], "--batch was given, but --ptq does not train"),
        (["--teacher", "dense", "--hard", "1", "--kd", "0"], "--teacher was given, but --kd and --hidden are 0, so"),
        (["--ptq", "--warmup", "0.1"], "--warmup was given, but --ptq does not train"),
        (["--ptq", "--qat-lr", "1e-5"], "--qat-lr was given, but --ptq does not train"),
        (["--calibration", "9"], "--calibration was given, but without --ptq"),
        (["--hidden", "1"], "--hidden was given, but without --teacher a model learns from the labels only; add"),
        (["--activations", "dynamic", "--freeze", "0.5"], "--freeze was given, but a scale per token"),
        (["--ptq", "--percentile", "99"], "add --observer percentile, or omit it"),
    ],
)
def test_options_that_would_do_nothing_are_refused(command, call, tmp_path, given, words):
    assert words in last(call(*command, *given))
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_gets_one_warning(root, command, call):
    said = call("quantize", root / SEED / "teacher", *command[2:], *ONCE)
    assert said.code == 0, said.err
    assert said.err.count("has no zeros to keep") == 1


def test_wrong_tasks_and_folders_are_refused(root, command, call, tmp_path):
    rest = command[2:]
    line = last(call("quantize", root / "run" / "sparse", *rest, "--ptq"))
    assert "not fine-tuned" in line
    line = last(call(*command[:3], "--task", "squad", "--data", root / "task.csv", "--ptq"))
    assert "--max-length is 384" in line
    (tmp_path / "others.csv").write_text("sentence,verdict\n" + "the king,meh\nthe queen,great\n" * 20)
    others = ["--data", tmp_path / "others.csv", "--validation", tmp_path / "others.csv"]
    line = last(call(*command[:3], *others, *TEXT, *FAST, "--ptq"))
    assert "label 'meh' in training row 1 is unknown; wanted one of bad, good" in line
    line = last(call(*command[:3], "--data", root / "task.csv", "--text", "review", "--label", "verdict", *FAST))
    assert "'review'" in line
    line = last(call(*command[:2], tmp_path / "out", *command[3:], "--ptq", "--observer", "median"))
    assert "observer is 'median'" in line
    line = last(call("quantize", tmp_path / "nowhere", *rest, "--ptq"))
    assert "nowhere: no such folder" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others.csv"]


@pytest.mark.parametrize("labels", [("0", "1"), ("GOOD", "bad"), ("good", "good")])
def test_the_classes_are_those_of_the_model(root, command, call, tmp_path, labels):
    rows = "".join(f"the king,{labels[row % 2]}\n" for row in range(40))
    (tmp_path / "own.csv").write_text("sentence,verdict\n" + rows)
    own = ["--data", tmp_path / "own.csv", "--validation", tmp_path / "own.csv"]
    said = call(*command[:3], *own, *TEXT, *FAST, "--ptq")
    if labels[0] == labels[1]:
        assert "all 40 training rows have the label 'good'" in last(said)
        return
    assert said.code == 0, said.err
    wanted = read_json(root / SEED / "transfer" / "config.json")["id2label"]
    assert read_json(tmp_path / "out" / "config.json")["id2label"] == wanted


def test_quantizing_twice_is_refused(command, call, tmp_path):
    assert call(*command, "--ptq").code == 0
    line = last(call("quantize", tmp_path / "out", tmp_path / "again", *command[3:], "--ptq"))
    assert "is already quantized (quantization.json is in it)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_pattern_broken_by_hand_fails_with_layer_and_count(root, command, call, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    broken = tmp_path / SEED / "transfer"
    tensors = load_file(broken / "model.safetensors")
    layer = "encoder.layer.0.output.dense.weight"
    weight = tensors[f"bert.{layer}"]
    weight[tuple(index[0] for index in (weight == 0).nonzero())] = 0.5
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    line = last(call("quantize", broken, *command[2:], "--ptq"), code=1)
    assert line.startswith("pruneofa: failed: ") and f"{layer}: 1 revived" in line
    shutil.copytree(broken, tmp_path / "elsewhere")  # nothing tells what its pattern was
    assert call("quantize", tmp_path / "elsewhere", *command[2:], "--ptq").code == 0


def test_a_cross_encoder_keeps_its_activation(command, call, tmp_path):
    shutil.copytree(command[1], tmp_path / "model")
    activation = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (tmp_path / "model/config_sentence_transformers.json").write_text(
        json.dumps({"model_type": "CrossEncoder"} | activation)
    )
    said = call(command[0], tmp_path / "model", *command[2:], "--ptq", "--activations", "dynamic")
    assert said.code == 0, said.err
    assert read_json(tmp_path / "out/config.json")["sentence_transformers"] == activation


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_model_of_another_loss_is_quantized_without_training_only(root, command, call, tmp_path, problem):
    folder = shutil.copytree(root / SEED / "transfer", tmp_path / "model")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"problem_type": problem})
    line = last(call("quantize", folder, *command[2:], *ONCE))
    assert f"model: problem_type is {problem} in config.json" in line and line.endswith("without training: --ptq")
    assert not (tmp_path / "out").exists()
    assert call("quantize", folder, *command[2:], "--ptq").code == 0


def test_a_run_whose_sparse_model_is_elsewhere_is_quantized_without_comparing(root, command, call, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    values = {"name": "small", "model": "models/mini", "model_is_sparse": True, "a_later_key": 1}
    for given in (values, {name: value for name, value in values.items() if name != "a_later_key"}):
        (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(given))
        said = call("quantize", tmp_path / SEED / "transfer", *command[2:], "--ptq", "--redo")
        why = "a_later_key" if "a_later_key" in given else "its run names the sparse model models/mini, which is no"
        assert said.code == 0 and "its zeros are kept, but not compared" in said.err and why in said.err, said.err
