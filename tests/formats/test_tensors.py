"""Weights in .bin files: read where torch is installed, refused with a command that works where it is not."""

import json
import pickle
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneofa import Engine
from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.pack import pack
from pruneofa.formats.tensors import weight_files, weights_folder
from pruneofa.formats.verify import verify
from tests.golden import source
from tests.tiny import modules_json


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEOFA_CACHE", str(tmp_path / "cache"))


def as_bin(folder, shards=1):
    """Put the weights of a folder in .bin files; returns them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for shard in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: weights[name] for name in names[shard::shards]}, folder / file)
        index |= dict.fromkeys(names[shard::shards], file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return weights


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_bin_is_read_by_a_copy_that_is_made_once(shards, tmp_path):
    folder = source(tmp_path / "model")
    assert weights_folder(folder) == folder
    wanted = pattern.inspect(folder)
    weights = as_bin(folder, shards)
    copy = weights_folder(folder)
    made = (copy / "model.safetensors").stat().st_mtime_ns
    assert weights_folder(folder) == copy != folder and (copy / "model.safetensors").stat().st_mtime_ns == made
    wanted_files = {"checksums.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in copy.iterdir()} - {"pytorch_model.bin.index.json"} == wanted_files
    found = load_file(copy / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)
    assert pattern.inspect(folder) == wanted and verify(folder, folder)["ok"]
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["pytorch_model_backup.bin", "pytorch_model.fp16.bin", "adapter_model.safetensors"])
def test_other_weights_in_the_folder_are_not_the_models(name, tmp_path):
    folder = source(tmp_path / "model")
    wanted = pattern.inspect(folder)
    other = {key: torch.zeros_like(weight) for key, weight in as_bin(folder).items()}
    save_file(other, folder / name) if name.endswith("safetensors") else torch.save(other, folder / name)
    assert pattern.inspect(folder) == wanted
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=rf"no model\.safetensors .* \(got {name}, which nothing says is the model\)"):
        pattern.inspect(folder)


def test_a_bin_is_packed_as_its_safetensors_are(tmp_path):
    folder = source(tmp_path / "model")
    wanted = pack(folder, tmp_path / "wanted")
    as_bin(folder)
    assert pack(folder, tmp_path / "packed") == wanted


def test_the_modules_of_sentence_transformers_go_with_a_bin(tmp_path):
    folder = source(tmp_path / "model")
    modules = modules_json()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    settings = folder / "1_Pooling" / "config.json"
    settings.write_text('{"pooling_mode": "cls"}')
    wanted = pack(folder, tmp_path / "wanted")
    as_bin(folder)
    assert pack(folder, tmp_path / "packed") == wanted
    assert (tmp_path / "packed/1_Pooling/config.json").read_text() == settings.read_text()
    settings.write_text('{"pooling_mode": "max"}')  # another model, although its weights are the same
    assert (weights_folder(folder) / "1_Pooling/config.json").read_text() == settings.read_text()


def test_a_link_to_nothing_beside_a_bin_is_named(tmp_path):
    folder = source(tmp_path / "model")
    as_bin(folder)
    (folder / "modules.json").symlink_to("nothing")
    with pytest.raises(InputError, match="model/modules.json: not a regular file; copy the file again"):
        weights_folder(folder)


def test_tied_weights_of_a_bin_become_two_tensors(tmp_path):
    folder = source(tmp_path / "model")
    weights = as_bin(folder)
    words = weights["bert.embeddings.word_embeddings.weight"]
    torch.save(weights | {"cls.predictions.decoder.weight": words}, folder / "pytorch_model.bin")
    assert torch.equal(load_file(weights_folder(folder) / "model.safetensors")["cls.predictions.decoder.weight"], words)


@pytest.mark.usefixtures("without_torch")
def test_without_torch_one_line_says_what_to_run(tmp_path, monkeypatch):
    folder = source(tmp_path / "a folder's name")  # blanks and quotes
    expected = pattern.inspect(folder)["pattern_hash"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        as_bin(folder)
    for read in (pattern.inspect, lambda path: verify(path, path), lambda path: pack(path, tmp_path / "out")):
        with pytest.raises(InputError, match=r"only a \.bin file.*convert it with: python -c") as error:
            read(folder)
        assert "\n" not in str(error.value)
    program, *arguments = shlex.split(str(error.value).split("convert it with: ")[1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    assert pattern.inspect(folder)["pattern_hash"] == expected


def test_the_engine_refuses_a_bin_with_torch_too(tmp_path):
    folder = source(tmp_path / "model")
    as_bin(folder)
    with pytest.raises(InputError, match=r"only a \.bin file"):
        Engine.from_pretrained(folder)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda trap: pickle.dumps(trap), "contains more than weights and could run code"),
        (lambda trap: b"PK\x03\x04" + bytes(99), r"pytorch_model\.bin: damaged \("),
        (lambda trap: b"", r"pytorch_model\.bin: damaged \("),
    ],
)
def test_a_bin_that_cannot_be_read(content, message, tmp_path):
    folder = source(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content(Trap(tmp_path / "sprung")))
    with pytest.raises(InputError, match=message):
        weights_folder(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_bin_of_other_things_than_tensors(tmp_path):
    folder = source(tmp_path / "model")
    torch.save({"model": as_bin(folder), "epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="contains objects other than tensors; wanted the state_dict"):
        weights_folder(folder)


def test_a_packed_folder_is_no_model_to_train_and_one_line_says_how_to_make_one(tmp_path):
    source(tmp_path / "model")
    pack(str(tmp_path / "model"), tmp_path / "packed")
    with pytest.raises(InputError, match=r"packed: is packed; make an ordinary folder first: pruneofa unpack "):
        weight_files(tmp_path / "packed")


def test_the_models_inside_a_folder_of_models_are_named(tmp_path):
    source(tmp_path / "run" / "sparse")
    with pytest.raises(InputError, match=r"run: no model.safetensors .* such as \S+/run/sparse$"):
        weight_files(tmp_path / "run")
