import os

import numpy as np
import pyarrow as pa
import pytest

from pruneofa import recipe
from pruneofa.data import rows
from pruneofa.data.baseline import baseline
from pruneofa.data.features import collate, evaluation_batches
from pruneofa.data.tasks import load_task, longest_input
from pruneofa.errors import InputError
from tests.data.task_files import ROWS, not_utf8, own, sst2, write
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path, tokenizer, suffix):
    write(tmp_path / "reference.jsonl", ROWS)
    write(tmp_path / f"data{suffix}", ROWS)
    reference = load_task("mine", own(data="reference.jsonl"), tokenizer, data_root=tmp_path)
    task = load_task("mine", own(data=f"data{suffix}"), tokenizer, data_root=tmp_path)
    assert task.train_fingerprint == reference.train_fingerprint
    assert task.evaluation_fingerprint == reference.evaluation_fingerprint
    assert task.labels == ["neg", "pos"]
    assert len(task.train) + len(task.evaluations[""]) == len(ROWS)
    assert task.model_kwargs() == {
        "num_labels": 2, "id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1},
    }  # fmt: skip


def test_a_suffix_in_capitals_is_the_same(tmp_path, tokenizer):
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        write(tmp_path / f"d{suffix}", ROWS).rename(tmp_path / f"D{suffix.upper()}")
        assert rows.read(tmp_path / f"D{suffix.upper()}", "t").to_pylist() == ROWS
        write(tmp_path / suffix / f"d{suffix}", ROWS).rename(tmp_path / suffix / f"train{suffix.upper()}")
        assert load_task("mine", own(data=suffix), tokenizer, data_root=tmp_path).held_out[1] == len(ROWS)
    with pytest.raises(InputError, match=r"NOWHERE\.CSV: no such file"):
        load_task("mine", own(data="NOWHERE.CSV"), tokenizer, data_root=tmp_path)


def test_features_are_what_the_tokenizer_gives(tmp_path, tokenizer):
    write(tmp_path / "d.csv", [{"a": "good film", "b": "bad book", "y": n % 2} for n in range(30)])
    spec = own(data="d.csv", validation="d.csv", text=["a", "b"], label="y")
    task = load_task("mine", spec, tokenizer, data_root=tmp_path)
    expected = tokenizer("good film", "bad book")
    assert list(task.train[3]["input_ids"]) == expected["input_ids"]
    assert list(task.train[3]["token_type_ids"]) == expected["token_type_ids"]
    assert task.train[3]["labels"] == 1
    assert len(task.train.ids) == 30 * len(expected["input_ids"])


def test_truncates_to_max_length_and_says_so(tmp_path, tokenizer):
    words = [99, 10, 11, 3]  # beside [CLS] and [SEP]
    write(tmp_path / "d.jsonl", [{"text": "film " * count, "label": n % 2} for n, count in enumerate(words)])
    spec = own(data="d.jsonl", validation="d.jsonl", max_length=12)
    task = load_task("mine", spec, tokenizer, data_root=tmp_path)
    assert list(task.train.lengths) == [12, 12, 12, 5]
    assert list(task.notes()) == [
        "tasks.mine: 4 of 8 rows are cut to 12 tokens, the rest of them is not seen; raise max_length for more"
    ]
    whole = load_task("mine", spec.model_copy(update={"max_length": 64}), tokenizer, data_root=tmp_path)
    assert "2 of 8 rows" in next(whole.notes())
    write(tmp_path / "d.jsonl", [{"text": "film", "label": n % 2} for n in range(4)])
    assert list(load_task("mine", spec, tokenizer, data_root=tmp_path).notes()) == []
    write(tmp_path / "d.jsonl", [{"text": " " if n == 2 else "film", "label": n % 2} for n in range(4)])
    (note,) = load_task("mine", spec, tokenizer, data_root=tmp_path).notes()
    assert note.startswith("tasks.mine: 2 of 8 rows have no text, and count like the others")


def test_quotes_and_newlines_in_csv(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('\ufefftext,label\n"one, ""two""\nthree",x\nplain,y\n', encoding="utf-8")
    assert rows.read(path, "t").to_pylist() == [
        {"text": 'one, "two"\nthree', "label": "x"},
        {"text": "plain", "label": "y"},
    ]


def test_unclosed_quote_in_tsv_is_text(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text('text\tlabel\n"open, never closed\tx\nplain\ty\n', encoding="utf-8")
    assert rows.read(path, "t")["text"].to_pylist() == ['"open, never closed', "plain"]


def test_first_rows_only(tmp_path, tokenizer):
    write(tmp_path / "d.jsonl", ROWS)
    spec = own(data="d.jsonl", validation="d.jsonl", train_rows=5, validation_rows=3)
    task = load_task("mine", spec, tokenizer, data_root=tmp_path)
    assert (len(task.train), len(task.evaluations[""])) == (5, 3)
    assert task.train.rows.to_pylist() == ROWS[:5]


def test_known_task_from_a_folder(tmp_path, tokenizer):
    sst2(tmp_path / "sst2")
    task = load_task("sst2", recipe.Task(data="sst2", max_length=16), tokenizer, data_root=tmp_path)
    assert (task.kind, task.labels) == ("classification", ["negative", "positive"])
    assert task.train.targets.tolist() == [0, 1]
    assert task.evaluations[""].targets.tolist() == [1]


def test_mnli_has_two_evaluations_and_shards_are_joined(tmp_path, tokenizer):
    row = {"premise": "a film", "hypothesis": "a book"}
    for name, labels in {
        "train-00000-of-00002": (0, 1), "train-00001-of-00002": (2,),
        "validation_matched": (0,), "validation_mismatched": (1, 2),
    }.items():  # fmt: skip
        write(tmp_path / f"{name}.parquet", [row | {"label": label} for label in labels])
    task = load_task("mnli", recipe.Task(data=".", max_length=16), tokenizer, data_root=tmp_path)
    assert task.train.targets.tolist() == [0, 1, 2]
    assert {suffix: len(data) for suffix, data in task.evaluations.items()} == {"": 1, "_mm": 2}


def test_evaluation_only_uses_the_labels_of_the_model(tmp_path, tokenizer):
    write(tmp_path / "d.jsonl", ROWS)
    spec = own(data="d.jsonl", validation="d.jsonl")
    task = load_task("mine", spec, tokenizer, data_root=tmp_path, train=False, labels=["pos", "neg"])
    assert task.train is None
    assert task.evaluations[""].targets[0] == 0  # pos, which sorts last


def test_evaluation_only_of_a_file_takes_all_its_rows_when_asked(tmp_path, tokenizer):
    write(tmp_path / "d.jsonl", ROWS)
    options = {"data_root": tmp_path, "train": False}
    task = load_task("mine", own(data="d.jsonl"), tokenizer, **options, whole=True)
    assert task.evaluations[""].rows.to_pylist() == ROWS and task.labels == ["neg", "pos"]
    assert len(load_task("mine", own(data="d.jsonl"), tokenizer, **options).evaluations[""]) < len(ROWS) / 3
    rows = [{"sentence": row["text"], "label": index % 2} for index, row in enumerate(ROWS)]
    write(tmp_path / "dev.tsv", rows)
    task = load_task("sst2", recipe.Task(data="dev.tsv", max_length=16), tokenizer, **options, whole=True)
    assert len(task.evaluations[""]) == len(ROWS)
    write(tmp_path / "few.jsonl", ROWS[:2])
    spec = own(data="d.jsonl", validation="few.jsonl")
    assert len(load_task("mine", spec, tokenizer, **options, whole=True).evaluations[""]) == 2


def test_evaluation_only_of_a_folder_needs_no_training_rows(tmp_path, tokenizer):
    options = {"data_root": tmp_path, "train": False, "whole": True}
    (sst2(tmp_path / "sst2") / "train.parquet").unlink()
    task = load_task("sst2", recipe.Task(data="sst2", max_length=16), tokenizer, **options)
    assert task.train is None and len(task.evaluations[""]) == 1
    write(tmp_path / "own" / "validation.jsonl", ROWS)
    assert len(load_task("mine", own(data="own"), tokenizer, **options).evaluations[""]) == len(ROWS)
    (tmp_path / "own" / "validation.jsonl").rename(tmp_path / "own" / "train.jsonl")
    with pytest.raises(InputError, match="no split 'validation'"):
        load_task("mine", own(data="own"), tokenizer, **options)


def test_fingerprints_follow_the_data(tmp_path, tokenizer):
    def fingerprints(data, **values):
        write(tmp_path / "d.jsonl", data)
        task = load_task("mine", own(data="d.jsonl", **values), tokenizer, data_root=tmp_path)
        return task.train_fingerprint, task.evaluation_fingerprint

    first = fingerprints(ROWS)
    assert fingerprints(ROWS) == first
    assert fingerprints(ROWS[1:]) != first
    assert fingerprints([*ROWS[:-1], ROWS[-1] | {"label": "pos"}]) != first
    assert fingerprints(ROWS, max_length=8) != first
    assert fingerprints(ROWS, lr=1.0) == first


def test_rows_of_one_split_are_no_part_of_the_others_fingerprint(tmp_path, tokenizer):
    def fingerprints(**values):
        spec = own(data="d.jsonl", validation="d.jsonl", **values)
        task = load_task("mine", spec, tokenizer, data_root=tmp_path)
        return task.train_fingerprint, task.evaluation_fingerprint

    write(tmp_path / "d.jsonl", ROWS)
    train, evaluation = fingerprints()
    fewer = fingerprints(validation_rows=len(ROWS) - 1)
    assert fewer[0] == train and fewer[1] != evaluation
    fewer = fingerprints(train_rows=len(ROWS) - 1)
    assert fewer[0] != train and fewer[1] == evaluation


def lengthy(tmp_path, tokenizer, count):
    words = np.random.default_rng(0).integers(1, 28, count)
    write(tmp_path / "d.jsonl", [{"text": "film " * n, "label": i % 2} for i, n in enumerate(words.tolist())])
    return load_task("mine", own(data="d.jsonl", validation="d.jsonl"), tokenizer, data_root=tmp_path).train


def test_every_epoch_has_every_feature_and_is_a_pure_function(tmp_path, tokenizer):
    data = lengthy(tmp_path, tokenizer, 203)
    dataset = data.train_dataset(8, seed=3, epochs=3)
    assert dataset.steps_per_epoch == 26
    assert len(dataset) == 3 * 26 * 8
    for epoch in range(3):
        assert set(dataset.order(epoch)) == set(range(203))
    assert list(dataset.order(0)) != list(dataset.order(1))
    again = data.train_dataset(8, seed=3, epochs=3)
    positions = [600, 3, 211, 3]  # out of order, across epochs
    for position in positions:
        np.testing.assert_array_equal(again[position]["input_ids"], dataset[position]["input_ids"])
    assert list(data.train_dataset(8, seed=4, epochs=3).order(0)) != list(dataset.order(0))
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_batches_hold_similar_lengths_in_random_order(tmp_path, tokenizer):
    data = lengthy(tmp_path, tokenizer, 800)
    batches = data.lengths[data.train_dataset(8, seed=0, epochs=1).order(0)].reshape(-1, 8)
    assert batches.max(1).sum() * 8 < 1.05 * batches.sum()  # random batches: about 1.7
    assert abs(np.corrcoef(np.arange(len(batches)), batches.mean(1))[0, 1]) < 0.3


def test_a_batch_larger_than_the_data_repeats_it(tmp_path, tokenizer):
    dataset = lengthy(tmp_path, tokenizer, 5).train_dataset(16, seed=0, epochs=1)
    assert len(dataset) == 16
    assert set(dataset.order(0)) == set(range(5))


def test_collate_pads_to_the_longest_and_no_further():
    items = [
        {"input_ids": np.array([2, 7, 3]), "token_type_ids": np.array([0, 0, 1]), "labels": 1},
        {"input_ids": np.arange(9), "token_type_ids": np.ones(9, np.uint8), "labels": 0},
    ]
    batch = collate(items, 5)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (2, 9), "token_type_ids": (2, 9), "attention_mask": (2, 9), "labels": (2,),
    }  # fmt: skip
    assert batch["input_ids"][0].tolist() == [2, 7, 3] + [5] * 6
    assert batch["token_type_ids"][0].tolist() == [0, 0, 1] + [0] * 6
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("size", [1, 4, 64])
def test_evaluation_batches_hold_every_feature_once_and_little_padding(size):
    lengths = np.random.default_rng(0).integers(3, 384, 700)
    batches = list(evaluation_batches(lengths, size))
    assert sorted(np.concatenate(batches)) == list(range(700))
    for batch in batches:
        longest = lengths[batch].max()
        assert longest * len(batch) <= 1.05 * lengths[batch].sum()
        assert len(batch) == 1 or longest * len(batch) <= 128 * size
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_baseline(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", ROWS + ROWS[:1])
    write(tmp_path / "validation.jsonl", ROWS[:3])
    spec = own(data="train.jsonl", validation="validation.jsonl")
    result = baseline(load_task("mine", spec, tokenizer, data_root=tmp_path))
    assert result == {"majority": pytest.approx(200 / 3), "bag_of_words": 100.0}


BAD_FILES = [
    ("d.csv", b"text,label\ngood,1\nb\xe4d,0\n", r"d\.csv: not UTF-8 at line 3"),
    ("d.csv", b"", "no header; its first line"),
    ("d.csv", b"text,label\n", "the file has no rows"),
    ("d.csv", b"text;label\na;x\nb;y\n", r"d\.csv: the delimiter looks like ';', wanted ',' in \.csv; write the file"),
    ("d.csv", b"text;label\none, two;x\n", r"d\.csv: the delimiter looks like ';', wanted ',' in \.csv; write the"),
    ("D.TSV", b"text,label\na,x\n", r"D\.TSV: the delimiter looks like ',', wanted '\\t' in \.tsv; write the file"),
    ("d.csv", b"text,label\na,b,c\n", "line 2 has 3 fields, the header 2"),
    ("d.csv", b"text,lable\na,b\n", "no label column 'label' among 'text', 'lable'; did you mean 'lable'"),
    ("d.csv", b"sentence,label\na,x\nb,y\n", r"no text column 'text' among 'sentence', 'label'; set tasks.mine.text"),
    ("d.csv", b"text,label\na,x\nb,x\n", "2 training rows have the label 'x', wanted at least two"),
    ("d.csv", b"text,label\na,x\nb,\n", "label column 'label' is empty in row 2"),
    ("d.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2 is not JSON"),
    ("d.jsonl", b'["a", 1]\n', "line 1 is a JSON list, wanted an object"),
    ("d.jsonl", b'{"text": "a", "label": 1}\n{"text": 2, "label": 1}\n', "mixes types"),
    ("d.jsonl", b'{"text": 3, "label": 1}\n', "text column 'text' holds int64, wanted strings"),
    ("d.jsonl", b'{"text": "a", "label": 1}\n{"label": 0}\n', "'text' is empty in 1 rows, first in row 2"),
    ("d.jsonl", b'{"text": "a", "label": 0.5}\n', "holds the number 0.5 in row 1, wanted classes"),
    ("d.jsonl", b'{"text": "a \\ud800", "label": 1}\n', "column 'text' has half of a surrogate pair, which is no text"),
    ("d.jsonl", b'{"text": "a", "label": "\\udc00"}\n', "column 'label' has half of a surrogate pair"),
    ("d.jsonl", b'{"text": "a", "label": 1' + b"0" * 30 + b"}\n", "column 'label' has an integer of over 64 bits"),
    ("d.jsonl", b'{"text": "a", "label": 1' + b"0" * 5000 + b"}\n", "line 1 is not JSON .*4300"),
    ("d.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
    ("d.csv", b"text,label\na,x\nb,y\1\n", r"label 'y\\x01' in row 2 of column 'label' has a control character"),
    ("d.csv", b"text,label\na,x\nb\0,y\n", r"d\.csv: NUL in line 3, which no text has; convert the file"),
    ("d.csv", b"text,label\n ,x\n,y\n", "text column 'text' is blank in all 2 rows"),
    ("d.parquet", b"PAR1 not really", "not readable as parquet"),
    ("d.txt", b"text", "got '.txt', wanted .parquet, .jsonl, .csv, .tsv"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_file(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_task("mine", own(data=name, validation=name), tokenizer, data_root=tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("tasks.mine")


def test_columns_of_every_type_of_string(tmp_path, tokenizer):
    texts, labels = ["a film", "the king"] * 4, ["x", "y"] * 4
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    for kind in kinds:
        pa.parquet.write_table(pa.table({"text": pa.array(texts, kind), "label": labels}), tmp_path / "d.parquet")
        task = load_task("mine", own(data="d.parquet", validation="d.parquet"), tokenizer, data_root=tmp_path)
        assert (task.labels, len(task.train)) == (["x", "y"], 8), kind


def test_parquet_that_is_not_utf8(tmp_path):
    table = pa.table({"text": not_utf8(), "label": ["x", "y"], "good": ["a film", "a book"]})
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    found = rows.read(tmp_path / "d.parquet", "tasks.mine")
    with pytest.raises(InputError, match=r"tasks\.mine: column 'text' cannot be read \(.*Invalid UTF8 sequence"):
        rows.text_column(found, "text", "tasks.mine")
    assert len(rows.text_column(found, "good", "tasks.mine")) == 2  # a column that nobody reads may be damaged


def test_missing_split(tmp_path, tokenizer):
    sst2(tmp_path)
    (tmp_path / "validation.parquet").unlink()
    with pytest.raises(InputError, match=r"no split 'validation' .*, found train.parquet"):
        load_task("sst2", recipe.Task(data=".", max_length=16), tokenizer, data_root=tmp_path)


def test_too_few_rows_to_hold_out(tmp_path, tokenizer):
    write(tmp_path / "d.csv", ROWS[:3])
    with pytest.raises(InputError, match=r"3 rows are too few .* tasks.mine.validation"):
        load_task("mine", own(data="d.csv"), tokenizer, data_root=tmp_path)


def test_nothing_there(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere\.csv: no such file"):
        load_task("mine", own(data="nowhere.csv"), tokenizer, data_root=tmp_path)

    def unreachable(*_):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.get_dataset_split_names", unreachable)
    (tmp_path / "reviews").mkdir()
    for typo in ("reviews/tarin", "./tarin", "~/tarin", "a/b/c"):
        with pytest.raises(InputError, match=r": no such file; check tasks.mine.data"):
            load_task("mine", own(data=typo), tokenizer, data_root=tmp_path)
    with pytest.raises(InputError, match=r"^data_root .*elsewhere: no such folder"):
        load_task("mine", own(data="d.csv"), tokenizer, data_root=tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"'some/where' is neither a file or folder in .* nor a readable hub"):
        load_task("mine", own(data="some/where"), tokenizer, data_root=tmp_path)


def test_hub_data_set_uses_the_configuration_of_the_task(tokenizer, monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"sentence": "a film", "label": n} for n in range(2)])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("sst2", recipe.Task(max_length=16), tokenizer)
    assert calls == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    assert len(task.train) == 2


def test_max_length_beyond_the_tokenizer(tmp_path, tokenizer):
    with pytest.raises(InputError, match="max_length is 128 but the tokenizer's limit is 64"):
        load_task("sst2", recipe.Task(data="."), tokenizer, data_root=tmp_path)


def test_max_length_beyond_the_model(tmp_path, tokenizer):
    write(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(InputError, match=r"tasks.mine.max_length is 32 but the model has 24 positions; lower it"):
        load_task("mine", own(data="d.jsonl"), tokenizer, data_root=tmp_path, max_positions=24)
    load_task("mine", own(data="d.jsonl"), tokenizer, data_root=tmp_path, max_positions=32)


def test_the_longest_input_of_a_model():
    assert [longest_input(make().config) for make in (tiny_bert, tiny_distilbert, tiny_roberta, tiny_mpnet)] == [
        64,
        64,
        65,
        64,
    ]


@pytest.mark.skipif("PRUNEOFA_DATA" not in os.environ, reason="PRUNEOFA_DATA does not name the data folder")
@pytest.mark.parametrize("name", recipe.KNOWN_TASKS)
def test_real_data(name, tokenizer):
    spec = recipe.Task(data=name, max_length=64, stride=16, train_rows=500, validation_rows=200)
    task = load_task(name, spec, tokenizer, data_root=os.environ["PRUNEOFA_DATA"])
    assert task.train.rows.num_rows == 500
    assert all(data.rows.num_rows == 200 for data in task.evaluations.values())
    batch = task.collate([task.train[i] for i in range(4)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
