"""Converting a folder for the engine: the same model as packing gives, and nothing is hashed."""

import hashlib

import numpy as np
import pytest

from pruneofa import Engine
from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.convert import convert
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import read
from tests.golden import DYNAMIC, STATIC, source


@pytest.fixture
def no_hashing(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("hashed")

    monkeypatch.setattr(hashlib, "sha256", fail)
    monkeypatch.setattr(hashlib, "file_digest", fail)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.usefixtures("no_hashing")
def test_the_engine_hashes_nothing_of_a_plain_folder(precision, tmp_path):
    folder = source(tmp_path / "model")
    with pytest.raises(AssertionError, match="hashed"):
        pattern.inspect(folder)
    assert Engine.from_pretrained(folder, precision=precision, threads=1).task == "classification"


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("variant", ["", STATIC, DYNAMIC])
def test_converting_gives_what_packing_and_reading_give(variant, precision, tmp_path):
    folder = source(tmp_path / "model", variant)
    converted = convert(folder, precision)
    pack(folder, tmp_path / "packed", precision=precision)
    written = read(tmp_path / "packed")
    for field in ("config", "precision", "input_scales", "quantized"):
        assert getattr(converted, field) == getattr(written, field)
    for part in ("linears", "embeddings"):
        found, wanted = getattr(converted, part), getattr(written, part)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            for field, array in vars(tensor).items():
                np.testing.assert_array_equal(array, getattr(wanted[name], field))
    assert converted.plain.keys() == written.plain.keys()
    for name, array in converted.plain.items():
        np.testing.assert_array_equal(array, written.plain[name], strict=True)


def test_a_quantized_folder_with_another_pattern_is_refused_by_the_engine_too(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = source(tmp_path / "model", DYNAMIC)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("output.dense.weight"))
    weights[name][weights[name] != 0] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="pattern lock was broken"):
        Engine.from_pretrained(folder, threads=1)
