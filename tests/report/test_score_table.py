"""The rows of results/score_table.py: equal tokens, an error for every arm, the accuracy after fine-tuning."""

import json
import runpy
import sys
from pathlib import Path

from pruneofa.formats.files import read_json
from tests.small import write_task, write_text
from tests.tiny import write_model

SCRIPT = Path(__file__).parents[2] / "results" / "score_table.py"
ARMS = [
    "magnitude",
    "magnitude/global/relative",
    "magnitude/uniform/hidden/once",
    "hessian",
    "hessian/global/hidden/gradual",
]


def test_every_arm_has_a_row(tmp_path, monkeypatch, capsys):
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    for split, rows in {"train": 48, "validation": 20}.items():
        write_task(tmp_path / "data" / "sst2" / f"{split}.csv", rows)
        file = tmp_path / "data" / "sst2" / f"{split}.csv"
        file.write_text(file.read_text().replace("verdict", "label").replace(",good", ",1").replace(",bad", ",0"))
    run = ["--steps", "6", "--batch", "4", "--length", "32", "--calibration", "16", "--final", "0.5"]
    run += ["--tasks", "sst2", "--data-root", str(tmp_path / "data"), "--epochs", "1", "--arms", *ARMS]
    given = ["score_table.py", str(tmp_path / "out"), "--model", str(model), "--text", str(text), *run]
    monkeypatch.setattr(sys, "argv", given)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = read_json(tmp_path / "out" / "table.json")["rows"]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["arm"] for row in rows] == ARMS
    assert all(row["error"] > 0 and 0 < row["relative"] < 2 and 0 <= row["sst2, seed 0"] <= 100 for row in rows)
    trained, calibration = rows[0]["tokens"], 16 * 32
    assert rows[1]["tokens"] == rows[2]["tokens"] == trained < rows[3]["tokens"] <= trained + calibration
    assert rows[3]["tokens"] < rows[4]["tokens"] <= trained + 3 * calibration  # selections after steps 1, 2 and 3
