"""What files may hold, and what a format can hold of it."""

import errno
import functools
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pruneofa.errors import InputError
from pruneofa.serve import batch, tables
from tests.serve.batch_files import parts, predict, read, rows, write, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory)


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


def test_the_columns_of_json_lines_are_those_that_any_row_has(models, tmp_path):
    """Were they those of the first row, its only column would be taken for the texts."""
    given = [{"id": "a1"}, {"id": "a2", "text": "a good film"}]
    file, out = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="row 1 is NoneType, wanted text"):
        predict(models["classifier"], [file], out)
    for options in ({}, {"text": "text"}):
        summary = predict(models["classifier"], [file], out, skip_bad=True, redo=True, **options)
        assert summary["skipped"] == 1 and [row["label"] is None for row in read(out)] == [True, False]


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
    ("in.jsonl", '{"text": "a"}\n{"text": "a", "label": 1}\n', "in.jsonl: has a column 'label' already; .*--prefix"),
    ("in.jsonl", '{"text": "a", "\\ud800": 1}\n', "the name of a column has half of a surrogate pair"),
    ("in.csv", "text,score\na,1\n", "has a column 'score' already; .*--prefix predicted_"),
    ("in.jsonl", '{"text": "a"}\nnonsense\n', "row 2 is not JSON"),
    ("in.jsonl", '{"text": "a"}\n[1]\n', "row 2 is a JSON list, wanted an object"),
    ("in.jsonl", '{"text": "a"}\n{"text": 3}\n', "row 2 is int, wanted text"),
    ("in.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "row 2 has a lone surrogate"),
    ("in.jsonl", '{"text": "a"}\n{"text": "' + "film " * 100 + '"}\n', "row 2 has 102 tokens, .*--truncate"),
    ("in.jsonl", '{"text": "a", "id": 1}\n{"text": "b"}\n', "row 2 has the columns 'text', the file 'text', 'id'"),
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
