"""Every stage of a run, 20 steps each, of the family whose attention has a bias by relative position."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForMaskedLM

from pruneofa import Engine
from pruneofa.formats import pattern
from pruneofa.formats.files import read_json
from pruneofa.formats.pack import pack
from pruneofa.formats.verify import verify
from pruneofa.run.run import run
from tests.peers import without_torch
from tests.small import small_recipe
from tests.tiny import tiny_mpnet, write_model

BIAS = "mpnet.encoder.relative_attention_bias.weight"


def test_a_run_of_mpnet(tmp_path, monkeypatch):
    without_torch(monkeypatch)
    settings = small_recipe(
        tmp_path,
        "corpus.nsp=false",
        "teacher.steps=20",
        "prune={steps: 20, batch: 8, lr: 1e-3, end: 10, stop: 16, interval: 1}",
        "tasks.mine.batch=10",
        "tasks.mine.qat_epochs=2",
        "quantize={activations: static}",
    )
    write_model(tmp_path / "model", tiny_mpnet())
    out = tmp_path / "run"
    run(settings, out)

    dense, sparse = (load_file(out / name / "model.safetensors") for name in ("teacher", "sparse"))
    assert dense[BIAS].shape == (32, 4) and np.abs(dense[BIAS] - sparse[BIAS]).max() > 0  # it is trained
    assert not (sparse[BIAS] == 0).any()  # and not pruned
    assert pattern.inspect(out / "sparse")["encoder"] == pytest.approx(0.9, abs=2e-3)
    assert AutoModelForMaskedLM.from_pretrained(out / "sparse", output_loading_info=True)[1]["missing_keys"] == set()

    seed = out / "tasks/mine/seed-0"
    for variant in ("transfer", "quantize"):
        assert verify(out / "sparse", seed / variant)["ok"]
    scores = read_json(out / "results.json")["tasks"]["mine"]["accuracy"]
    for variant in ("dense", "transfer", "quantize"):
        assert scores[f"{variant}_engine"]["mean"] == pytest.approx(scores[variant]["mean"], abs=6)

    pack(seed / "quantize", tmp_path / "packed")
    texts = ["the king is good", "that book has terrible music. " * 3]
    answers = [
        Engine.from_pretrained(path, threads=1).predict(texts) for path in (seed / "quantize", tmp_path / "packed")
    ]
    assert answers[0] == answers[1] and answers[0][0]["scores"] != answers[0][1]["scores"]
