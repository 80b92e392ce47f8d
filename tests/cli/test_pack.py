"""`pack`, `unpack`, and `inspect` of what they make."""

import json
import shutil

import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from pruneofa.formats.files import read_json
from pruneofa.formats.manifest import COMPRESSED, MANIFEST, TENSORS
from tests.golden import GOLDEN, LAYER, STATIC, source
from tests.quantized import quantize_folder


@pytest.fixture
def model(tmp_path):
    return source(tmp_path / "model")


def test_there_and_back(model, tmp_path, call):
    said = call("pack", model, tmp_path / "packed", "--precision", "fp32", "--json")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out) == read_json(tmp_path / "packed" / MANIFEST)
    said = call("unpack", tmp_path / "packed", tmp_path / "again", "--json")
    assert (said.code, json.loads(said.out)) == (0, {"out": str(tmp_path / "again")})
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "again"))
    assert {n: (a.dtype, a.tobytes()) for n, a in before.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in after.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model", "packed"]


def test_pack_shows_what_it_cost(model, tmp_path, call):
    said = call("pack", model, tmp_path / "packed", "--compress")
    assert (said.code, said.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "config.json", MANIFEST, COMPRESSED, "tokenizer.json",
    ]  # fmt: skip
    for word in ("packed, version 1", "int8", "zstd", "compressed_bits_per_weight", "entropy_bound", "file", "MB"):
        assert word in said.out


def test_a_model_of_the_hub_may_have_a_bin_only(model, tmp_path, call, monkeypatch):
    assert call("pack", model, tmp_path / "wanted").code == 0
    torch.save(load_torch(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()

    def download(name, allow_patterns):
        names = [file.name for file in model.iterdir() if any(file.match(pattern) for pattern in allow_patterns)]
        for file in names:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(model / file, tmp_path / name / file)
        return tmp_path / name

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    said = call("pack", "org/model", tmp_path / "packed")
    assert said.code == 0, said.err
    assert (tmp_path / "packed" / TENSORS).read_bytes() == (tmp_path / "wanted" / TENSORS).read_bytes()


@pytest.mark.parametrize(
    ("precision", "embeddings", "note"),
    [("int8", True, ""), ("fp32", True, "fp32 omits the int8 scales of"),
     ("fp32", False, "fp32 omits the int8 scales of"), ("int8", False, "packing changed the embedding tables of")],
)  # fmt: skip
def test_what_differs_from_training_is_said_in_one_line(precision, embeddings, note, model, tmp_path, call):
    quantize_folder(model, embeddings=embeddings)
    said = call("pack", model, tmp_path / "packed", "--precision", precision, "--json")
    assert said.code == 0 and json.loads(said.out)["precision"] == precision
    assert said.err == "" if not note else said.err.startswith(f"pruneofa: note: {note} {model}")
    assert said.err.count("\n") == bool(note)


def test_inspect_of_a_packed_folder(model, tmp_path, call):
    call("pack", model, tmp_path / "packed")
    dense = json.loads(call("inspect", model, "--json").out)
    packed = json.loads(call("inspect", tmp_path / "packed", "--json").out)
    for key in ("encoder", "pooler", "pattern_hash", "pooler_hash"):
        assert packed[key] == dense[key]
    assert list(packed["layers"]) == list(dense["layers"])
    for name, layer in dense["layers"].items():
        assert packed["layers"][name] == layer | {"pattern": packed["layers"][name]["pattern"]}
    assert packed["sizes"]["file"] == (tmp_path / "packed" / TENSORS).stat().st_size
    said = call("inspect", tmp_path / "packed")
    assert said.code == 0 and LAYER.removeprefix("bert.") in said.out and "bits_per_weight" in said.out


@pytest.mark.parametrize(
    ("variant", "activations"), [(STATIC, "static"), ("v1-int8", "dynamic"), ("v1-fp32", "dynamic")]
)
def test_inspect_says_what_the_engine_does_by_default(variant, activations, call):
    said = call("inspect", GOLDEN / variant, "--engine", "--json")
    assert json.loads(said.out)["engine"]["activations"] == activations
    assert ("packed in fp32, computed in int8" in said.err) == (variant == "v1-fp32")
    assert f"{activations} activations" in call("inspect", GOLDEN / variant, "--engine").out


def test_what_is_refused(model, tmp_path, refused):
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert f"{model}: no manifest.json" in refused("unpack", model, out)
    assert f"{model}: exists" in refused("pack", model, model)
    assert "no such folder" in refused("pack", tmp_path / "nowhere", out)
    assert "invalid choice: 'int4'" in refused("pack", model, out, "--precision", "int4")
    shutil.copytree(model, packed)
    (packed / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused("pack", packed, out)
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["model", "packed"]


def test_a_damaged_packed_folder_is_refused(model, tmp_path, call, refused):
    call("pack", model, tmp_path / "packed")
    file = tmp_path / "packed" / TENSORS
    file.write_bytes(file.read_bytes()[:-1])
    line = refused("unpack", tmp_path / "packed", tmp_path / "out")
    assert line.startswith(f"{file}: ") and "as manifest.json states; copy or download the folder again" in line


def test_packing_twice_is_refused(model, tmp_path, call, refused):
    call("pack", model, tmp_path / "packed")
    assert "is already packed" in refused("pack", tmp_path / "packed", tmp_path / "out")
