"""Files of texts: every format, every task, rows neither lost nor repeated, and what is refused."""

import csv
import errno
import functools
import itertools
import json
import math
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
from pruneofa.serve.batch import predict_files
from tests.tiny import WORDS, write_folder

HEADS = {
    "classifier": "ForSequenceClassification",
    "answers": "ForQuestionAnswering",
    "tokens": "ForTokenClassification",
    "masks": "ForMaskedLM",
    "vectors": "Model",
}
ROWS = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_folder(root / name, head) for name, head in HEADS.items()}


def rows(count=ROWS):
    """Rows whose texts have commas, quotes and line breaks, and lengths of 1 to 12 words."""
    random = np.random.default_rng(0)
    words = [word for word in WORDS.split() if not word.startswith("#")]
    return [
        {"id": str(i), "text": " ".join(random.choice(words, random.integers(1, 12))) + ', "x"\ny é'}
        for i in range(count)
    ]


def write(path, given):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(given), path, row_group_size=25)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in given), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, given[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(given)
    return path


def read(path):
    """Rows of a file as Python objects; the results of CSV are understood."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    for row in found:
        row |= {"score": float(row["score"]), "scores": json.loads(row["scores"])}
    return found


def predict(model, files, out, **settings):
    return predict_files(model, files, out, threads=1, **{"rows": 16} | settings)


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


def start(models, file, out, *more):
    command = [sys.executable, "-m", "pruneofa", "predict", models["classifier"], file, "--out", out]
    command += ["--rows", "8", "--threads", "2", *more]
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def parts(out):
    return [part for folder in out.parent.glob(f".{out.name}.*.parts") for part in chunks.find_parts(folder)]


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


@pytest.mark.parametrize("target", tables.SUFFIXES)
def test_a_jsonl_without_rows_adds_none(models, tmp_path, target):
    given = rows(2)
    full, empty = write(tmp_path / "full.jsonl", given), write(tmp_path / "empty.jsonl", [])
    for number, files in enumerate([[full, empty], [empty, full]]):
        out = tmp_path / f"out{number}{target}"
        assert predict(models["classifier"], files, out, text="text")["rows"] == 2
        found = read(out)
        assert [list(row) for row in found] == [["id", "text", "label", "score", "scores"]] * 2
        assert [row["id"] for row in found] == ["0", "1"]


@pytest.mark.parametrize("target", [".csv", ".jsonl"])
def test_what_json_has_no_notation_for(models, tmp_path, target):
    table = {
        "text": ["a", "b"],
        "x": [math.nan, math.inf],
        "nested": [{"l": [1.0, -math.inf], "b": b"\xff"}, {"l": [], "b": b"ok"}],
        "b": [b"\xff\x00", "é".encode()],
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    predict(models["classifier"], [tmp_path / "in.parquet"], tmp_path / f"out{target}")
    found = read(tmp_path / f"out{target}")
    nested = [row["nested"] if target == ".jsonl" else json.loads(row["nested"]) for row in found]
    assert nested == [{"l": [1.0, None], "b": "/w=="}, {"l": [], "b": "ok"}]
    assert [row["b"] for row in found] == ["/wA=", "é"]
    assert [row["x"] for row in found] == ([None, None] if target == ".jsonl" else ["nan", "inf"])


def test_numbers_of_jsonl_that_are_none_become_null(models, tmp_path):
    lines = ['{"text": "a", "x": 1e400}', '{"text": "a", "x": [NaN, "\\ud800", {"y": -Infinity, "z": 1}]}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    predict(models["classifier"], [tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()
    assert [row["x"] for row in read(tmp_path / "out.jsonl")] == [None, [None, "\ud800", {"y": None, "z": 1}]]


BIG = 2**60 + 1  # no float64
UNFIT = [
    ([{"x": BIG}, {"x": 1.5}], 9, "row 1: column 'x' has a value .* beside|row 2: column 'x' has a value .* beside"),
    ([{"x": BIG}, {"x": 1.5}], 1, "row 2 and those after it: column 'x' is int64 in some rows and double"),
    ([{"x": {"y": [BIG]}}, {"x": {"y": [1.5], "z": 1}}], 1, "row 2 and those after it: column 'x' is struct"),
    ([{"x": 1.5}, {"x": BIG}], 1, "row 2 and those after it: column 'x' is int64 in some rows and double"),
    ([{}, {"x": {}}], 9, "row 2: column 'x' has a value .*no child field"),
    ([{}, {"x": functools.reduce(lambda x, _: [x], range(900))}], 9, "row 2: column 'x' has a value .*deeply nested"),
    ([{"x": None}, {"x": 5}, {"x": [1]}], 9, "row 3: column 'x' has a value .*list.* beside"),
    ([{"x": 5}, {"x": 2**70}], 9, "row 2: column 'x' has a value .*too large"),
    ([{}, {"x": ["\ud800"]}], 9, "row 2: column 'x' has half of a surrogate pair"),
    ([{}, {"\ud800": 1}], 9, r"row 1: column '\\ud800' has half of a surrogate pair"),
    ([{"x": 1}, {"x": "b"}, {"x": 2}], 1, "row 2 and those after it: column 'x' is string, int64 in other rows"),
]


@pytest.mark.parametrize(("given", "size", "message"), UNFIT)
def test_what_parquet_cannot_hold_is_named_and_its_part_is_not_kept(models, tmp_path, given, size, message):
    file, out = write(tmp_path / "in.jsonl", [{"text": "a"} | row for row in given]), tmp_path / "out.parquet"
    for _ in range(2):
        with pytest.raises(InputError, match=f"in.jsonl: ({message}).*choose a .jsonl --out"):
            predict(models["classifier"], [file], out, rows=size)
        assert [part.start for part in parts(out)] == ([0] if size == 1 else [])
    assert predict(models["classifier"], [file], tmp_path / "out.jsonl", rows=size)["rows"] == len(given)
    write(file, [{"text": "a"}])
    assert predict(models["classifier"], [file], out, rows=size, redo=True)["rows"] == 1


def test_types_of_files_are_compared_before_any_row_is_computed(models, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text,n\na,1\n")
    write(tmp_path / "b.parquet", [{"text": "a", "n": 1}])
    write(tmp_path / "c.parquet", [{"text": "a", "n": 1.5}])
    monkeypatch.setattr(batch, "compute", None)
    with pytest.raises(InputError, match=r"b.parquet: column 'n' is int64, string in \S+a.csv; .*choose a folder or"):
        predict(models["classifier"], [tmp_path / "a.csv", tmp_path / "b.parquet"], tmp_path / "out.parquet")
    monkeypatch.undo()
    predict(models["classifier"], [tmp_path / "b.parquet", tmp_path / "c.parquet"], tmp_path / "out.parquet")
    assert [row["n"] for row in read(tmp_path / "out.parquet")] == [1.0, 1.5]


def test_a_csv_without_rows_keeps_its_columns_before_the_results(models, tmp_path):
    (tmp_path / "empty.csv").write_text("id,text\n")
    empty, one = tmp_path / "empty.csv", write(tmp_path / "one.csv", rows(1))
    for number, files in enumerate([[empty], [empty, one], [one, empty]]):
        out = tmp_path / f"{number}.parquet"
        predict(models["classifier"], files, out)
        schema = pq.read_schema(out)
        assert schema.names == ["id", "text", "label", "score", "scores"]
        assert schema.types[:2] == [pa.string()] * 2


def test_types_of_parquet_without_rows_do_not_matter(models, tmp_path):
    times, numbers = (
        pa.schema([("text", pa.string()), ("t", kind)]) for kind in (pa.timestamp("us", "UTC"), pa.int64())
    )
    pq.write_table(times.empty_table(), tmp_path / "times.parquet")
    pq.write_table(numbers.empty_table(), tmp_path / "numbers.parquet")
    files = [tmp_path / "times.parquet", tmp_path / "numbers.parquet"]
    predict(models["classifier"], files, tmp_path / "none.parquet")
    assert pq.read_schema(tmp_path / "none.parquet").names == ["text", "t", "label", "score", "scores"]
    files.append(write(tmp_path / "full.parquet", [{"text": "a", "t": 5}]))
    predict(models["classifier"], files, tmp_path / "out.parquet")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["text", "t", "label", "score", "scores"] and schema.field("t").type == pa.int64()
    assert [row["t"] for row in read(tmp_path / "out.parquet")] == [5]


def test_categories_and_texts_are_one_column(models, tmp_path):
    categories = pa.array(["x", None, "y"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["a"] * 3, "kind": categories}), tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", [{"text": "a", "kind": "z"}])
    for number, names in enumerate(["ab", "ba"]):
        out = tmp_path / f"{number}.parquet"
        predict(models["classifier"], [tmp_path / f"{name}.parquet" for name in names], out)
        assert pq.read_schema(out).field("kind").type == pa.string()
        assert [row["kind"] for row in read(out)] == (["x", None, "y", "z"] if names == "ab" else ["z", "x", None, "y"])
    ordered = categories.cast(pa.dictionary(pa.int32(), pa.string(), ordered=True))
    pq.write_table(pa.table({"text": ["a"] * 3, "kind": ordered}), tmp_path / "o.parquet")
    predict(models["classifier"], [tmp_path / "a.parquet", tmp_path / "o.parquet"], tmp_path / "both.parquet")
    assert [row["kind"] for row in read(tmp_path / "both.parquet")] == ["x", None, "y"] * 2
    predict(models["classifier"], [tmp_path / "a.parquet"], tmp_path / "alone.parquet", rows=1)
    assert pa.types.is_dictionary(pq.read_schema(tmp_path / "alone.parquet").field("kind").type)


def test_a_required_column_that_another_file_lacks_has_nulls(models, tmp_path):
    schema = pa.schema([("text", pa.string()), pa.field("n", pa.int64(), nullable=False)])
    pq.write_table(pa.table({"text": ["a"], "n": [1]}, schema), tmp_path / "a.parquet")
    files = [tmp_path / "a.parquet", write(tmp_path / "b.csv", [{"text": "a"}])]
    predict(models["classifier"], files, tmp_path / "out.parquet")
    assert [row["n"] for row in read(tmp_path / "out.parquet")] == [1, None]


@pytest.mark.parametrize("size", [1, 9])
def test_rows_without_any_key_get_null_results_in_parquet(models, tmp_path, size):
    file, out = write(tmp_path / "in.jsonl", [{"text": "a b"}, {}, {}, {"text": "c"}]), tmp_path / "out.parquet"
    assert predict(models["classifier"], [file], out, text="text", rows=size, skip_bad=True)["skipped"] == 2
    assert [(row["text"], row["label"] is None) for row in read(out)] == [
        ("a b", False), (None, True), (None, True), ("c", False),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 9])
def test_objects_without_keys_are_written_beside_others_of_their_part(models, tmp_path, size):
    given, out = [{"text": "a", "x": {"y": 1}}, {"text": "a", "x": {}}], tmp_path / "out.parquet"
    file = write(tmp_path / "in.jsonl", given)
    if size == 1:
        with pytest.raises(InputError, match="row 2: column 'x' has a value .*no child field"):
            predict(models["classifier"], [file], out, rows=size)
    else:
        predict(models["classifier"], [file], out, rows=size)
        assert [row["x"] for row in read(out)] == [{"y": 1}, {"y": None}]


def test_texts_that_are_none_come_out_as_json_where_they_are_skipped(models, tmp_path):
    given = [{"text": "a film"}, {"text": None}, {"text": 5}, {"text": [1, "b"]}]
    file = write(tmp_path / "in.jsonl", given)
    for size in (9, 1):
        out = tmp_path / f"{size}.parquet"
        assert predict(models["classifier"], [file], out, rows=size, skip_bad=True)["skipped"] == 3
        assert [row["text"] for row in read(out)] == ["a film", None, "5", '[1, "b"]']


def test_a_full_disk_is_not_called_wrong_input(models, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        predict(models["classifier"], [write(tmp_path / "in.jsonl", rows(2))], tmp_path / "out.parquet")


BAD_PARQUET = [
    (
        {"text": ["a"], "a": [1], "b": [2]},
        ["text", "a", "a"],
        "in.parquet: the name 'a' is that of two columns; rename",
    ),
    ({"text": ["a"], "b": ["b"]}, ["text", "text"], "in.parquet: the name 'text' is that of two columns; rename one"),
    (
        {"text": ["a"], "b": pa.array([2**62], pa.timestamp("us"))},
        None,
        "in.parquet: row 1: column 'b' is not readable",
    ),
    (
        {"text": ["a"], "b": pa.array([b"\xff"]).view(pa.string())},
        None,
        "in.parquet: row 1: column 'b' is not readable",
    ),
    ({"text": pa.array([b"\xff"]).view(pa.string())}, None, "in.parquet: row 1: column 'text' is not readable"),
]


@pytest.mark.parametrize(("table", "names", "message"), BAD_PARQUET)
def test_a_wrong_parquet_is_refused(models, tmp_path, table, names, message):
    table = pa.table(table)
    pq.write_table(table.rename_columns(names or table.column_names), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=message):
        predict(models["classifier"], [tmp_path / "in.parquet"], tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


BAD = [
    ("in.csv", 'text\na\n"b', "line 3: unexpected end of data"),
    ("in.csv", "id,text\n1,a\n2\n", "line 3 has 1 fields, the header 2"),
    ("in.csv", "", "no header"),
    ("in.csv", "a,a\n1,2\n", "has a name twice"),
    ("in.csv", "a,b\n1,2\n", "which column of 'a', 'b' has the texts"),
    ("in.csv", "text;n\na;1\n", "which column of 'text;n' has the texts.* looks like ';', wanted ',' in .csv"),
    ("in.csv", "label\n", "has a column 'label' already; .*--prefix predicted_"),
    ("in.jsonl", '{"text": "a"}\n{"text": "a", "label": 1}\n', "row 2: has a column 'label' already; .*--prefix"),
    ("in.jsonl", '{"text": "a", "\\ud800": 1}\n', "the name of a column has half of a surrogate pair"),
    ("in.csv", "text,score\na,1\n", "has a column 'score' already; .*--prefix predicted_"),
    ("in.jsonl", '{"text": "a"}\nnonsense\n', "row 2 is not JSON"),
    ("in.jsonl", '{"text": "a"}\n[1]\n', "row 2 is a JSON list, wanted an object"),
    ("in.jsonl", '{"text": "a"}\n{"text": 3}\n', "row 2 is int, wanted text"),
    ("in.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "row 2 has a lone surrogate"),
    ("in.jsonl", '{"text": "a"}\n{"text": "' + "film " * 100 + '"}\n', "row 2 has 102 tokens, .*--truncate"),
    ("in.jsonl", '{"text": "a", "id": 1}\n{"text": "b"}\n', "row 2 has the columns 'text', row 1 'text', 'id'"),
    ("in.parquet", "nonsense", "not readable as parquet"),
    ("in.xlsx", "", "got '.xlsx', wanted .parquet, .jsonl, .csv, .tsv"),
    ("in.csv", b"text\n\xff\xfe\n", "not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_wrong_file_is_refused_and_leaves_nothing(models, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        predict(models["classifier"], [file], tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_row_that_is_too_long_costs_only_itself(models, tmp_path):
    given = rows(40)
    given[7]["text"] = "film " * 100
    file = write(tmp_path / "in.parquet", given)
    summary = predict(models["vectors"], [file], tmp_path / "out.parquet", skip_bad=True)
    found = read(tmp_path / "out.parquet")
    assert summary["skipped"] == 1
    assert [row["id"] for row in found if row["embedding"] is None] == ["7"]
    assert predict(models["vectors"], [file], tmp_path / "cut.parquet", truncate=True)["skipped"] == 0
