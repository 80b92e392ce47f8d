"""The files of a split, and the rows of it that are held out for every epoch."""

import numpy as np
import pyarrow as pa
import pytest

from pruneofa import recipe
from pruneofa.data import rows
from pruneofa.data.tasks import load_task
from pruneofa.errors import InputError, NotNow
from tests.data.task_files import ROWS, own, write
from tests.formats.test_hub import raising
from tests.tiny import tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("first", [0, 1])
def test_shards_are_joined_however_they_are_numbered(tmp_path, tokenizer, first):
    for index in range(12):
        write(tmp_path / f"train-{index + first}-of-12.jsonl", [{"sentence": f"film {index}", "label": index % 2}])
    write(tmp_path / "validation.jsonl", [{"sentence": "a film", "label": 0}])
    task = load_task("sst2", recipe.Task(data=".", max_length=16), tokenizer, data_root=tmp_path)
    assert len(task.train) == 12


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003.parquet"],
        ["train-00000-of-00002.parquet", "train-00002-of-00002.parquet"],
        ["train.csv", "train.jsonl"],
        ["train.parquet", "train-00000-of-00001.parquet"],
        ["train-00000-of-00001.parquet", "train-00000-of-00001.jsonl"],
    ],
)
def test_a_split_that_lacks_shards_or_is_there_twice(tmp_path, tokenizer, names):
    for name in [*names, "validation.jsonl"]:
        write(tmp_path / name, [{"sentence": "a film", "label": 0}, {"sentence": "a book", "label": 1}])
    with pytest.raises(InputError, match=f"got {', '.join(sorted(names))}, wanted one file of the split, or as many"):
        load_task("sst2", recipe.Task(data=".", max_length=16), tokenizer, data_root=tmp_path)


def test_rows_that_are_evaluated_after_each_epoch_are_part_of_the_fingerprint(tmp_path, tokenizer):
    rows = [{"text": f"film {n}", "label": "neg" if n % 2 else "pos"} for n in range(60)]

    def made(rows):
        write(tmp_path / "d.jsonl", rows)
        spec = own(data="d.jsonl", validation="d.jsonl", check_epochs=True)
        return load_task("mine", spec, tokenizer, data_root=tmp_path)

    task = made(rows)
    held_out = task.epoch_rows.rows.column("text")[0].as_py()
    other = [
        row | {"label": "neg" if row["label"] == "pos" else "pos"} if row["text"] == held_out else row for row in rows
    ]
    assert made(other).train_fingerprint != task.train_fingerprint == made(rows).train_fingerprint


def test_a_hub_that_does_not_answer_is_told_from_a_data_set_that_is_not_there(tmp_path, tokenizer, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    spec = recipe.Task(data="some/where", max_length=16)
    for error, now in ((ConnectionError("cannot reach the hub"), False), (FileNotFoundError("no such data set"), True)):
        monkeypatch.setattr("datasets.get_dataset_split_names", raising(error))
        with pytest.raises(InputError, match="'some/where' is neither a file or folder") as found:
            load_task("sst2", spec, tokenizer, data_root=tmp_path)
        assert isinstance(found.value, NotNow) != now


def test_hold_out_follows_the_content_not_the_order():
    twice = [*ROWS, *ROWS]  # duplicates must not be on both sides
    table = pa.Table.from_pylist(twice)
    train, held = rows.hold_out(table, ["text"], "label", "t")
    assert 0 < held.num_rows < table.num_rows / 3
    assert not set(train["text"].to_pylist()) & set(held["text"].to_pylist())
    _, reversed_held = rows.hold_out(table.take(np.arange(len(twice))[::-1]), ["text"], "label", "t")
    assert sorted(reversed_held["text"].to_pylist()) == sorted(held["text"].to_pylist())


def test_hold_out_leaves_a_row_of_every_label_in_training():
    rare = [{"text": f"rare {n}", "label": f"only {n}"} for n in range(30)]
    train, held = rows.hold_out(pa.Table.from_pylist([*ROWS, *rare]), ["text"], "label", "t")
    assert set(held["label"].to_pylist()) <= {"pos", "neg"}
    assert len(set(train["label"].to_pylist())) == 32


def test_hold_out_compares_labels_as_loading_does():
    ones = pa.Table.from_pylist([{"text": f"text {n}", "label": "1"} for n in range(40)])
    _, held = rows.hold_out(ones, ["text"], "label", "t")
    written = [
        {"text": text, "label": "1.0" if text in held["text"].to_pylist() else "1"} for text in ones["text"].to_pylist()
    ]
    _, again = rows.hold_out(pa.Table.from_pylist(written), ["text"], "label", "t")
    assert again["text"].to_pylist() == held["text"].to_pylist()
