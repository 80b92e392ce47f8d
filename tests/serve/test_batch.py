"""Files of texts: every format, every task, rows neither lost nor repeated, and what is refused."""

import csv
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pruneofa import Engine
from pruneofa.errors import InputError
from pruneofa.formats.files import marked
from pruneofa.formats.locks import exclusive
from pruneofa.serve import batch, chunks, tables
from tests.serve.batch_files import ROWS, parts, predict, read, rows, write, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory)


@pytest.mark.parametrize("source", tables.SUFFIXES)
@pytest.mark.parametrize("target", tables.SUFFIXES)
def test_the_same_rows_come_out_with_results(models, tmp_path, source, target):
    given, out = rows(), tmp_path / f"out{target}"
    summary = predict(models["classifier"], [write(tmp_path / f"in{source}", given)], out)
    assert (summary["rows"], summary["skipped"], summary["resumed"]) == (ROWS, 0, 0)
    expected = Engine.from_pretrained(models["classifier"], threads=1).predict([row["text"] for row in given])
    found = read(out)
    assert [{key: row[key] for key in ("id", "text", "label")} for row in found] == [
        row | {"label": result["label"]} for row, result in zip(given, expected, strict=True)
    ]
    np.testing.assert_allclose([row["score"] for row in found], [row["score"] for row in expected], rtol=1e-5)
    assert [list(row["scores"]) for row in found] == [list(row["scores"]) for row in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"in{source}", out.name])


def test_vectors_are_lists_of_fixed_size(models, tmp_path):
    given = rows()
    predict(models["vectors"], [write(tmp_path / "in.jsonl", given)], tmp_path / "out.parquet", prefix="my_")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("my_embedding").type == pa.list_(pa.float32(), 32)
    expected = Engine.from_pretrained(models["vectors"], threads=1).predict([row["text"] for row in given])
    vectors = np.stack(table.column("my_embedding").to_numpy())
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    predict(models["vectors"], [tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    text = [row["embedding"] for row in read(tmp_path / "out.jsonl")]
    np.testing.assert_array_equal(np.array(text, np.float32), vectors)  # every bit
    assert [list(row) for row in read(tmp_path / "out.jsonl")] == [["id", "text", "embedding"]] * ROWS


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_vectors_are_one_field_of_delimited_text(models, tmp_path, suffix):
    given = rows()
    given[3]["text"] = ""  # skipped
    file, out = write(tmp_path / "in.jsonl", given), tmp_path / f"out{suffix}"
    assert predict(models["vectors"], [file], out, skip_bad=True)["skipped"] == 1
    with open(out, newline="", encoding="utf-8") as lines:
        found = list(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True))
    fields = [row.pop("embedding") for row in found]
    assert found == given
    assert fields.pop(3) == ""
    expected = Engine.from_pretrained(models["vectors"], threads=1).predict([r["text"] for r in given if r["text"]])
    np.testing.assert_array_equal(np.array([json.loads(field) for field in fields], np.float32), expected)


def test_texts_alone_come_out_with_vectors(models, tmp_path):
    (tmp_path / "in.csv").write_text('text\n"a, film"\n""\na film\n', encoding="utf-8")
    predict(models["vectors"], [tmp_path / "in.csv"], tmp_path / "out.csv", skip_bad=True)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as lines:
        found = list(csv.reader(lines, strict=True))
    assert [(row[0], row[1][:1]) for row in found] == [("text", "e"), ("a, film", "["), ("", ""), ("a film", "[")]


@pytest.mark.parametrize("target", [".parquet", ".jsonl"])
def test_answers_entities_and_masks(models, tmp_path, target):
    questions = [{"q": "what is it?", "p": row["text"]} for row in rows(5)]
    out = tmp_path / f"answers{target}"
    predict(models["answers"], [write(tmp_path / "q.csv", questions)], out, question="q", context="p")
    for row, found in zip(questions, read(out), strict=True):
        assert found["answer"] == row["p"][found["start"] : found["end"]]
    file = write(tmp_path / "in.csv", rows(5))
    predict(models["tokens"], [file], tmp_path / f"tokens{target}")
    found = read(tmp_path / f"tokens{target}")
    assert all(row["entities"] for row in found)
    for row in found:
        spans = [(entity["start"], entity["end"]) for entity in row["entities"]]
        assert spans == sorted(spans)
        assert [entity["word"] for entity in row["entities"]] == [row["text"][start:end] for start, end in spans]
        labels = [entity["label"] for entity in row["entities"]]
        assert all(one != two for one, two in itertools.pairwise(labels))
    file = write(tmp_path / "masked.csv", [{"text": "a [MASK] film and [MASK] story"}])
    predict(models["masks"], [file], tmp_path / f"masks{target}")
    (row,) = read(tmp_path / f"masks{target}")
    assert [mask["label"] in dict(mask["scores"]) for mask in row["masks"]] == [True, True]


def test_a_folder_holds_a_file_per_file_and_an_empty_file_stays(models, tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "head.csv").write_text("text\n")
    files = [write(tmp_path / "a.csv", rows(20)), tmp_path / "none.parquet", tmp_path / "head.csv"]
    predict(models["classifier"], files, tmp_path / "out")
    assert [len(read(tmp_path / "out" / file.name)) for file in files] == [20, 0, 0]
    assert pq.read_schema(tmp_path / "out" / "none.parquet").names == ["text", "label", "score", "scores"]
    predict(models["classifier"], [files[0], write(tmp_path / "b.csv", rows(3))], tmp_path / "both.csv")
    assert [row["id"] for row in read(tmp_path / "both.csv")] == [str(i) for i in [*range(20), *range(3)]]


def test_several_processes_keep_the_order_and_replace_one_that_is_killed(models, tmp_path, monkeypatch):
    file = write(tmp_path / "in.jsonl", rows())
    predict(models["classifier"], [file], tmp_path / "one.jsonl")
    killed = []
    give = chunks._Worker.give

    def give_and_kill(worker, chunk):
        give(worker, chunk)
        if chunk.start == 32 and not killed:
            killed.append(worker._process.pid)
            os.kill(worker._process.pid, signal.SIGKILL)

    monkeypatch.setattr(chunks._Worker, "give", give_and_kill)
    summary = predict(models["classifier"], [file], tmp_path / "two.jsonl", processes=2)
    assert killed and summary["rows"] == ROWS
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert multiprocessing.active_children() == []


def test_a_process_that_ends_by_itself_was_not_killed(models, tmp_path, monkeypatch):
    file = write(tmp_path / "in.jsonl", rows())
    monkeypatch.setattr(chunks, "_worker", os._exit)  # which takes other arguments
    with pytest.raises(
        InputError, match=r'ended by themselves at row \d+ \(exit code 1\); .*if __name__ == "__main__":'
    ):
        predict(models["classifier"], [file], tmp_path / "out.jsonl", processes=2)


def start(models, file, out, *more):
    command = [sys.executable, "-m", "pruneofa", "predict", models["classifier"], file, "--out", out]
    command += ["--rows", "8", "--threads", "2", *more]
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process, out, count):
    while len(parts(out)) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_it_continues_and_no_row_is_lost_or_repeated(models, tmp_path, processes):
    file, out = write(tmp_path / "in.csv", rows(1200)), tmp_path / "out.csv"
    for count in (3, 20):
        process = start(models, file, out, "--processes", processes)
        wait_for(process, out, count)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists() and len(parts(out)) < 150
    kept = len(parts(out))
    process = start(models, file, out, "--processes", processes, "--json")
    said, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    summary = json.loads(said)
    assert summary["rows"] == 1200 and summary["resumed"] >= 8 * kept
    predict(models["classifier"], [file], tmp_path / "straight.csv", rows=8)
    assert out.read_bytes() == (tmp_path / "straight.csv").read_bytes()
    assert parts(out) == []


def test_ctrl_c_says_what_is_kept(models, tmp_path):
    file, out = write(tmp_path / "in.csv", rows(1200)), tmp_path / "out.csv"
    process = start(models, file, out)
    wait_for(process, out, 3)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    kept = 8 * len(parts(out))
    assert errors.splitlines()[-1] == (
        f"pruneofa: interrupted; {kept} of 1200 rows are kept; the same command continues there"
    )


def test_killed_before_the_parts_are_removed_it_ends_as_it_should(models, tmp_path, monkeypatch):
    file, out = write(tmp_path / "in.csv", rows()), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr("pruneofa.serve.batch.remove_folder", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(models["classifier"], [file], out)
    before = out.read_bytes()
    assert predict(models["classifier"], [file], out)["resumed"] == ROWS
    assert out.read_bytes() == before and parts(out) == []


def test_other_settings_do_not_continue(models, tmp_path, monkeypatch):
    file, out = write(tmp_path / "in.csv", [*rows(), {"id": "", "text": ""}]), tmp_path / "out.csv"
    with pytest.raises(InputError, match=r"in.csv: row 61 is an empty string.*--skip-bad"):
        predict(models["classifier"], [file], out)
    assert len(parts(out)) == 3
    with pytest.raises(InputError, match=r"unfinished with other settings \(prefix\).*--redo"):
        predict(models["classifier"], [file], out, prefix="p_")
    summary = predict(models["classifier"], [file], out, skip_bad=True)
    assert (summary["resumed"], summary["skipped"]) == (48, 1)
    with open(out, newline="") as found:
        assert list(csv.reader(found))[-1] == ["", "", "", "", ""]
    with pytest.raises(InputError, match="exists; replace it with --redo"):
        predict(models["classifier"], [file], out, skip_bad=True)
    assert predict(models["classifier"], [file], out, skip_bad=True, redo=True)["resumed"] == 0


def test_redo_replaces_only_what_this_command_writes(models, tmp_path):
    file, out = write(tmp_path / "in.csv", rows(3)), tmp_path / "out"
    predict(models["classifier"], [file], out)
    (out / "thesis.csv").write_text("mine")
    with pytest.raises(InputError, match=r"out: contains thesis.csv, which this command does not write"):
        predict(models["classifier"], [file], out, redo=True)
    (out / "thesis.csv").unlink()
    inside = write(out / "in.csv", rows(3))
    with pytest.raises(InputError, match=r"in.csv: is read and would be replaced"):
        predict(models["classifier"], [inside], out, redo=True)
    assert predict(models["classifier"], [file], out, redo=True)["rows"] == 3


def test_a_link_as_out_is_the_file_that_it_points_to(models, tmp_path):
    file, out = write(tmp_path / "in.csv", rows(3)), tmp_path / "elsewhere" / "out.jsonl"
    out.parent.mkdir()
    (tmp_path / "link.jsonl").symlink_to(out)
    with exclusive(out), pytest.raises(InputError, match=r"link.jsonl: another pruneofa is at work here"):
        predict(models["classifier"], [file], tmp_path / "link.jsonl")
    predict(models["classifier"], [file], tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink() and len(read(out)) == 3
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_what_a_kill_left_while_joining_or_removing_parts_is_removed(models, tmp_path, monkeypatch):
    file, out = write(tmp_path / "in.csv", rows(40)), tmp_path / "out.csv"
    monkeypatch.setattr(batch, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        predict(models["classifier"], [file], out)
    (work,) = tmp_path.glob(".out.csv.*.parts")
    monkeypatch.undo()
    marked(out, "tmp").write_text("half of the rows")
    marked(work, "tmp").mkdir()
    assert predict(models["classifier"], [file], out)["resumed"] == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


@pytest.mark.parametrize("when", ["before the first part", "while parts were removed"])
def test_what_a_kill_left_of_other_settings_is_removed(models, tmp_path, monkeypatch, when):
    file, out = write(tmp_path / "in.csv", rows(40)), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(models["classifier"], [file], out)
    (work,) = tmp_path.glob(".out.csv.*.parts")
    if when == "before the first part":
        for part in chunks.find_parts(work):
            part.path.unlink()
    else:  # of --redo
        work.rename(marked(work, "tmp"))
    assert predict(models["classifier"], [file], out, prefix="p_", redo=True)["resumed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_the_parts_of_a_file_whose_name_begins_the_same_are_not_taken(models, tmp_path, monkeypatch):
    file, out = write(tmp_path / "in.csv", rows(40)), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(models["classifier"], [file], out)
    predict(models["classifier"], [file], tmp_path / "out")
    predict(models["classifier"], [file], tmp_path / "out", redo=True, prefix="p_")
    assert predict(models["classifier"], [file], out)["resumed"] == 40


def test_two_at_once_are_refused(models, tmp_path):
    file, out = write(tmp_path / "in.csv", rows(1200)), tmp_path / "out.csv"
    process = start(models, file, out)
    wait_for(process, out, 1)
    with pytest.raises(InputError, match="another pruneofa is at work here"):
        predict(models["classifier"], [file], out)
    process.kill()
    process.communicate()
