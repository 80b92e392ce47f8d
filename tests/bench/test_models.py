"""The models and cases of a benchmark."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pruneofa import families
from pruneofa.bench import models
from pruneofa.bench.models import Case, Settings
from pruneofa.bench.random_folder import prune, write_random
from pruneofa.engine import engine
from pruneofa.errors import InputError
from pruneofa.families.mpnet import MPNET
from pruneofa.formats.pattern import BLOCKS, pattern_holds
from tests.tiny import POSITIONS, VOCABULARY


def test_inputs_are_the_same_every_time_and_padded_only_where_lengths_differ():
    case = Case("2x5", (5, 5))
    [ids] = case.inputs(100, 0).values()
    assert ids.shape == (2, 5) and ids.dtype == np.int64 and ids.min() >= 10 and ids.max() < 100
    assert (ids == case.inputs(100, 0)["input_ids"]).all()
    padded = Case("2x2-5", (2, 5)).inputs(100, 1)
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert padded["input_ids"][0, 2:].tolist() == [1, 1, 1]


def cases(folder: Path, tmp_path: Path, **settings) -> list[Case]:
    settings = Settings(path=str(folder), **settings)
    return models.read_cases(settings, next(models.read_models(settings, tmp_path / "work")))


def test_cases_are_lengths_that_fit(folder, tmp_path):
    names = [case.name for case in cases(folder, tmp_path, batch=2)]
    assert names == ["2x32"]  # 128 and 384 are over the model's positions
    [mixed] = cases(folder, tmp_path / "2", mixed=("9x3-20",))
    assert len(mixed.lengths) == 9 and 3 <= min(mixed.lengths) < max(mixed.lengths) <= 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"seq": (POSITIONS + 1,)},
            rf"1x{POSITIONS + 1}: {POSITIONS + 1} tokens, but the model takes 1 to {POSITIONS}",
        ),
        ({"seq": (0,)}, "1x0: 0 tokens"),
        ({"batch": 0}, "batch is 0, wanted at least 1"),
        ({"mixed": ("32x9-8",)}, "--mixed 32x9-8: wanted COUNTxSHORTEST-LONGEST"),
        ({"mixed": ("some",)}, "--mixed some: wanted"),
    ],
)
def test_what_is_no_case(folder, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        cases(folder, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "wanted exactly one model; give PATH, or --random SHAPE"),
        ({"path": "x", "random": "bert-base"}, "wanted exactly one model"),
        ({"random": "bert-bse"}, "--random 'bert-bse': wanted one of bert-base, bert-large"),
        ({"random": "minilm", "pattern": "8x1"}, "pattern '8x1': wanted one of unstructured, 4x1, 1x4"),
        ({"random": "minilm", "sparsity": 90.0}, "sparsity is 90.0, wanted at least 0 and below 1"),
        ({"random": "minilm", "also": ("4x1",)}, "--also 4x1: wanted PATTERN@SPARSITY"),
    ],
)
def test_what_is_no_model(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        list(models.read_models(Settings(**settings), tmp_path))
    assert not any(tmp_path.iterdir())


def test_the_family_is_described_without_a_class_in_config_json(tmp_path, monkeypatch):
    tiny = families.Shape("tiny", "Tiny", layers=1, hidden=64, heads=4, inner=128)
    monkeypatch.setattr(families, "FAMILIES", (replace(MPNET, shapes=(tiny,)),))
    write_random(tmp_path / "folder", "tiny", 0.75)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config.pop("architectures", None)
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    model = next(models.read_models(Settings(path=str(tmp_path / "folder")), tmp_path / "work"))
    described = models.describe(model)
    assert (described["family"], described["architecture"], described["layers"]) == ("mpnet", None, 1)


def test_operations_are_those_of_linears_and_attention(folder, tmp_path):
    model = next(models.read_models(Settings(path=str(folder)), tmp_path / "work"))
    hidden, inner, layers = 32, 64, 2
    linears = 2 * layers * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 2 * layers * 2 * hidden
    assert model.operations(Case("", (5, 7))) == linears * 12 + attention * (25 + 49)


@pytest.mark.parametrize(
    ("pattern", "family"), [*((pattern, families.FAMILIES[0]) for pattern in BLOCKS), ("unstructured", MPNET)]
)
def test_a_random_folder_has_the_zeros_asked_for_and_loads(tmp_path, monkeypatch, pattern, family):
    from pruneofa.formats import pattern as patterns

    tiny = families.Shape("tiny", "Tiny", layers=1, hidden=64, heads=4, inner=128)
    monkeypatch.setattr(families, "FAMILIES", (replace(family, shapes=(tiny,)),))
    write_random(tmp_path, "tiny", 0.75, pattern)
    found = patterns.inspect(tmp_path)
    assert found["encoder"] == pytest.approx(0.75, abs=1e-3) and len(found["layers"]) == 6
    assert all(pattern_holds(w != 0, pattern) for _, w in patterns.read_weights(tmp_path, patterns.is_prunable))
    if engine.native is not None:
        loaded = engine.Engine.from_pretrained(tmp_path, threads=1)
        assert loaded.predict("w7 w8").shape == (64,) and loaded.max_length == 512


def test_the_smallest_are_pruned():
    weight = np.array([[1, -5, 2, 6], [3, 0.1, -4, 7]], np.float32)
    assert prune(weight, 0.5, "unstructured").tolist() == [[0, -5, 0, 6], [0, 0, -4, 7]]
    assert prune(weight, 0.5, "1x4").tolist() in ([[0] * 4, weight[1].tolist()], [weight[0].tolist(), [0] * 4])
    assert (prune(weight, 0.0, "1x4") == weight).all()


def test_random_ids_are_in_the_vocabulary():
    ids = Case("4x50", (50,) * 4).inputs(len(VOCABULARY), 0)["input_ids"]
    assert ids.min() >= 5 and ids.max() < len(VOCABULARY)
