"""The verb `predict`: what it prints, its exit codes, and that it needs no torch."""

import json
import subprocess
import sys

import pytest

from tests.tiny import write_folder

WITHOUT = """
import sys
for name in ("torch", "transformers", "datasets", "pandas", "pyarrow"):
    sys.modules[name] = None
from pruneofa.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A model and a table, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model")
    (tmp_path / "reviews.csv").write_text("id,review\n1,a good film\n2,a bad one\n")
    return tmp_path


def test_the_summary_is_json_and_the_rows_are_in_the_file(here, call):
    said = call("predict", "model", "reviews.csv", "--text", "review", "--out", "out.jsonl", "--threads", 1, "--json")
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert (summary["rows"], summary["skipped"], summary["resumed"]) == (2, 0, 0)
    rows = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["id", "review", "label", "score", "scores"]] * 2


def test_another_delimiter_is_named(here, refused):
    (here / "semi.csv").write_text("text;n\na;1\n")
    said = refused("predict", "model", "semi.csv", "--text", "text", "--out", "out.csv")
    assert "no column 'text' among 'text;n': the delimiter looks like ';', wanted ',' in .csv; write the file" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "reviews.csv: which column of 'id', 'review' has the texts? Name it with --text"),
        (("--text", "reviw"), "reviews.csv: no column 'reviw' among 'id', 'review'; did you mean 'review'?"),
        (("--question", "id"), "--question was given, but the model's task is classification; give --text"),
        (("--processes", 0), "--processes is 0, wanted at least 1"),
        (("--out", "reviews.csv"), "reviews.csv: is read and would be replaced; choose another --out"),
        (("--out", "out.xlsx"), "got '.xlsx', wanted .parquet, .jsonl, .csv, .tsv, or a folder"),
    ],
)
def test_a_mistake_costs_one_line(here, refused, options, message):
    assert message in refused("predict", "model", "reviews.csv", "--out", "out.csv", *options)
    assert sorted(path.name for path in here.iterdir()) == ["model", "reviews.csv"]


def without(*arguments):
    command = [sys.executable, "-c", WITHOUT, "predict", "model", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_csv_needs_neither_torch_nor_pyarrow(here):
    run = without("reviews.csv", "--text", "review", "--out", "out.csv", "--threads", "1")
    assert run.returncode == 0, run.stderr
    assert len((here / "out.csv").read_text().splitlines()) == 3


def test_parquet_without_pyarrow_names_the_extra(here):
    run = without("reviews.csv", "--text", "review", "--out", "out.parquet")
    assert (run.returncode, run.stderr) == (
        3,
        "pruneofa: error: parquet needs pyarrow: pip install 'pruneofa[predict]'\n",
    )
