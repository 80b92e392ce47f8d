"""What results/stsb.py prints, of a tiny sentence-transformers folder whose config.json names a head that it lacks."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import MPNetModel

from tests.small import BAD, GOOD, SUBJECTS
from tests.tiny import half_pruned, tiny_mpnet, write_model

SCRIPT = Path(__file__).parents[2] / "results" / "stsb.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with mean pooling, and pairs of sentences with a score."""
    folder = write_model(tmp_path_factory.mktemp("sentence"), half_pruned(tiny_mpnet(MPNetModel)))
    modules = [
        {"type": f"sentence_transformers.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MPNetForMaskedLM"]}))
    random = np.random.default_rng(0)
    # Never the same sentence twice, because rounding ranks cosines of 1.
    first, second = (
        [f"{random.choice(subjects)} {random.choice(GOOD + BAD)}" for _ in range(50)]
        for subjects in (SUBJECTS[:4], SUBJECTS[4:])
    )
    pairs = {"sentence1": first, "sentence2": second, "score": random.uniform(0, 5, 50)}
    pq.write_table(pa.table(pairs), folder / "pairs.parquet")
    return folder


def test_the_engine_correlates_as_transformers_does(inputs, monkeypatch, capsys):
    found = {}
    for by in ("transformers", "engine-fp32", "engine-int8"):
        monkeypatch.setattr(sys, "argv", ["stsb.py", str(inputs), str(inputs / "pairs.parquet"), "--by", by])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        found[by] = json.loads(capsys.readouterr().out)
    assert found["engine-fp32"]["spearman"] == pytest.approx(found["transformers"]["spearman"], abs=0.01)
    assert found["engine-int8"]["spearman"] == pytest.approx(found["transformers"]["spearman"], abs=20)
    assert found["engine-int8"]["pairs"] == 50 and "int8" in found["engine-int8"]["by"]
