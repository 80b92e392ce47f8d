"""The lines that `verify` ends with."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from pruneofa.cli.verify import conclusion
from tests.tiny import half_pruned, tiny_bert, write_model


@pytest.fixture
def base(tmp_path):
    return write_model(tmp_path / "base", half_pruned(tiny_bert()))


def test_the_last_line_says_what_was_found(base, call, tmp_path):
    said = call("verify", base, base)
    assert (said.code, said.out) == (0, "ok: every zero of BASE is zero in DERIVED, which has 0 zeros more\n")
    derived = tmp_path / "derived"
    shutil.copytree(base, derived)
    tensors = load_file(derived / "model.safetensors")
    names = [name for name in tensors if name.endswith("output.dense.weight") and "attention" not in name]
    for count, name in enumerate(names[:2], 1):
        weight = tensors[name]
        for index in list(zip(*(weight == 0).nonzero(), strict=True))[:count]:
            weight[index] = 0.5
    save_file(tensors, derived / "model.safetensors", {"format": "pt"})
    said = call("verify", base, derived)
    assert said.code == 1
    assert said.out.splitlines()[-1] == "FAILED: 3 zeros of BASE are not zero in DERIVED, in 2 layers"
    found = json.loads(call("verify", base, derived, "--json").out)
    assert [layer["count"] for layer in found["revived"]] == [1, 2] and not found["ok"]


def test_missing_layers_are_counted():
    found = {"ok": False, "revived": [], "not_finite": [], "missing": ["a", "b"], "extra_zeros": 0}
    assert conclusion(found) == "FAILED: DERIVED lacks 2 layers of BASE"


@pytest.mark.parametrize("pruned", [True, False])
def test_a_weight_that_is_no_number_is_named_as_such(base, call, tmp_path, pruned):
    derived = tmp_path / "derived"
    shutil.copytree(base, derived)
    tensors = load_file(derived / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors[name][tuple(part[0] for part in ((tensors[name] == 0) == pruned).nonzero())] = float("nan")
    save_file(tensors, derived / "model.safetensors", {"format": "pt"})
    said = call("verify", base, derived)
    assert said.code == 1
    assert said.out.splitlines() == [
        f"NaN or infinite: {name.removeprefix('bert.')}: 1 weights",
        "FAILED: 1 weight of DERIVED is NaN or infinite",
    ]


def test_a_dense_base_has_nothing_to_keep(base, refused, tmp_path):
    dense = write_model(tmp_path / "dense")
    line = refused("verify", dense, base)
    assert line.startswith(f"{dense}: no weight of its encoder is zero") and "give the sparse model as BASE" in line
