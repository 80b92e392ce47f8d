"""What the labels of a task are: names, class ids, and what is neither."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from pruneofa import recipe
from pruneofa.data.tasks import load_task
from pruneofa.errors import InputError
from tests.data.task_files import ROWS, own, sst2, write
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("values", "labels"),
    [((10, 9, 1), ["1", "9", "10"]), (("10", "9", "b"), ["10", "9", "b"]), ((1.0, 0.0, 1.0), ["0", "1"]),
     ((True, False, True), ["False", "True"])],
)  # fmt: skip
def test_labels_are_sorted_values(tmp_path, tokenizer, values, labels):
    write(tmp_path / "d.parquet", [{"text": "film", "label": value} for value in values])
    task = load_task("mine", own(data="d.parquet", validation="d.parquet"), tokenizer, data_root=tmp_path)
    assert task.labels == labels


@pytest.mark.parametrize("validation", [None, "d.parquet"])
def test_a_column_of_row_ids_holds_no_classes(tmp_path, tokenizer, validation):
    write(tmp_path / "d.parquet", [{"text": f"film {row}", "label": row} for row in range(40)])
    spec = own(data="d.parquet", validation=validation)
    with pytest.raises(InputError, match="'label' has 40 classes for 40 rows: looks like an id column; set tasks.mine"):
        load_task("mine", spec, tokenizer, data_root=tmp_path)
    write(tmp_path / "d.parquet", [{"text": f"film {row}", "label": row % 20} for row in range(40)])
    assert len(load_task("mine", spec, tokenizer, data_root=tmp_path).labels) == 20


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("text", "label is the text column 'text', wanted"),
        ("long", "'long' has 40 classes for 40 rows: looks like a c"),
    ],
)
def test_a_column_of_texts_holds_no_classes(tmp_path, tokenizer, label, message):
    write(tmp_path / "d.parquet", [{"text": f"film {row}", "long": f"film {row} " * 9} for row in range(40)])
    spec = own(data="d.parquet", validation="d.parquet", label=label)
    with pytest.raises(InputError, match=f"tasks.mine.*{message}"):
        load_task("mine", spec, tokenizer, data_root=tmp_path)


def test_names_of_one_row_each_may_be_classes(tmp_path, tokenizer, capsys):
    write(tmp_path / "d.csv", [{"text": f"a film {row}", "label": f"intent_{row}"} for row in range(12)])
    spec = own(data="d.csv", validation="d.csv")
    assert len(load_task("mine", spec, tokenizer, data_root=tmp_path).labels) == 12
    said = "warning: tasks.mine: label column 'label' has 12 classes for 12 rows; set tasks.mine.label to"
    assert capsys.readouterr().err.count(said) == 1
    with pytest.raises(InputError, match=r"12 rows are too few to hold out one in 10; give .* tasks\.mine\.validation"):
        load_task("mine", own(data="d.csv"), tokenizer, data_root=tmp_path)


def test_the_first_rows_may_be_of_one_class_each(tmp_path, tokenizer, capsys):
    write(tmp_path / "d.csv", [{"text": f"a film {row}", "label": row % 12} for row in range(48)])
    spec = own(data="d.csv", validation="d.csv", train_rows=12)
    assert len(load_task("mine", spec, tokenizer, data_root=tmp_path).train) == 12
    assert "classes for" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"12 rows are too few .*; set tasks\.mine\.check_epochs=false"):
        load_task("mine", spec.model_copy(update={"check_epochs": True}), tokenizer, data_root=tmp_path)


@pytest.mark.parametrize(("labels", "said"), [([-1, 0, 1, 2], True), ([-1, 0, 1], True), ([-1, 1], False)])
def test_minus_one_may_stand_for_no_label(tmp_path, tokenizer, capsys, labels, said):
    write(tmp_path / "d.parquet", [{"text": "film", "label": label} for label in labels * 4])
    task = load_task("mine", own(data="d.parquet", validation="d.parquet"), tokenizer, data_root=tmp_path)
    assert task.labels == [str(label) for label in labels]
    line = f"warning: tasks.mine: label -1 in 4 of {4 * len(labels)} rows is a class of its own; "
    assert (line in capsys.readouterr().err) is said


def test_label_unseen_in_training(tmp_path, tokenizer):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "validation.csv", [*ROWS[:2], {"text": "a", "label": "neutral"}])
    spec = own(data="train.csv", validation="validation.csv")
    with pytest.raises(InputError, match=r"label 'neutral' in validation row 3 is unknown; wanted one of neg, pos"):
        load_task("mine", spec, tokenizer, data_root=tmp_path)


def test_unlabelled_split_is_refused(tmp_path, tokenizer):
    sst2(tmp_path, validation=((-1, "film"),))
    with pytest.raises(InputError, match="label -1 in validation row 1"):
        load_task("sst2", recipe.Task(data=".", max_length=16), tokenizer, data_root=tmp_path)


@pytest.mark.parametrize(
    ("classes", "found", "targets"),
    [
        (["negative", "positive"], ["0", "1"], [0, 1]),
        (["negative", "positive"], [1.0, 0.0], [1, 0]),
        (["a", "b", "c"], ["c", "a"], [2, 0]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [2, 1], [2, 1]),
        (["LABEL_0", "LABEL_1"], ["y", "x"], [1, 0]),
        (["1", "2"], ["1.0", "2"], [0, 1]),
        (["Good", "BAD"], ["bad", "Good"], [1, 0]),
        (["good", "Good"], ["Good", "good"], [1, 0]),
        (["nan", "some"], ["nan", "some"], [0, 1]),
    ],
)
def test_labels_of_a_model_are_its_names_or_its_class_ids(tmp_path, tokenizer, classes, found, targets):
    write(tmp_path / "d.jsonl", [{"text": f"film {label}", "label": label} for label in found])
    options = {"data_root": tmp_path, "train": False, "whole": True, "labels": classes}
    assert load_task("mine", own(data="d.jsonl"), tokenizer, **options).evaluations[""].targets.tolist() == targets


def test_class_ids_are_refused_beside_names(tmp_path, tokenizer):
    write(tmp_path / "d.csv", [{"text": "a", "label": "negative"}, {"text": "b", "label": "1"}])
    options = {"data_root": tmp_path, "train": False, "whole": True, "labels": ["negative", "positive"]}
    with pytest.raises(InputError, match="label '1' in validation row 2 is unknown"):
        load_task("mine", own(data="d.csv"), tokenizer, **options)


def test_one_and_one_point_zero_are_one_label(tmp_path, tokenizer):
    write(tmp_path / "d.csv", [{"text": f"{n}", "label": label} for n, label in enumerate(["1", "1.0", "0"])])
    assert load_task("mine", own(data="d.csv", validation="d.csv"), tokenizer, data_root=tmp_path).labels == ["0", "1"]


@pytest.mark.parametrize(
    ("suffix", "labels", "message"),
    [
        (".csv", ["1.0", "0.25"], "holds the number 0.25 in row 2, wanted classes; regression is not supported yet"),
        (".csv", ["1", "nan", "0.25"], "holds the number 0.25 in row 3, wanted classes; regression"),
        (".csv", ["0,5", "1,5"], "holds the number 0,5 in row 1, wanted classes; regression"),
        (".jsonl", [["a"], ["a", "b"]], "holds a list in row 1, wanted one class per row; multi-label"),
        (".csv", ["[0, 1]", "[1]"], "holds a list in row 1, wanted one class per row; multi-label"),
    ],
)
def test_numbers_and_lists_are_no_classes(tmp_path, tokenizer, suffix, labels, message):
    write(tmp_path / f"d{suffix}", [{"text": str(n), "label": label} for n, label in enumerate(labels)])
    spec = own(data=f"d{suffix}", validation=f"d{suffix}")
    with pytest.raises(InputError, match=message):
        load_task("mine", spec, tokenizer, data_root=tmp_path)


def test_label_names_and_numbers_of_a_known_task_are_the_same(tmp_path, tokenizer):
    data = sst2(tmp_path / "names", train=(("negative", "bad"), ("positive", "good")), validation=(("1", "x"),))
    task = load_task("sst2", recipe.Task(data=str(data), max_length=16), tokenizer)
    assert task.train.targets.tolist() == [0, 1]
    assert task.evaluations[""].targets.tolist() == [1]


NAMED = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["positive", "negative"])}


def class_labels(path, ids=(0, 1, 1, 0), names=("positive", "negative"), text="text"):
    """A file as `datasets` writes it: the names of the ids are in its metadata."""
    kinds = datasets.Features({text: datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    table = pa.table({text: [f"film {row}" for row in range(len(ids))], "label": pa.array(ids, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table.replace_schema_metadata(kinds.arrow_schema.metadata), path)


def targets(tmp_path, tokenizer, labels=None, **values):
    spec = own(**{"data": "d.parquet", "validation": "d.parquet", **values})
    options = {"train": False, "labels": labels} if labels else {}
    task = load_task("mine", spec, tokenizer, data_root=tmp_path, **options)
    return task.labels, task.evaluations[""].targets.tolist()


def test_class_ids_have_the_names_of_the_file(tmp_path, tokenizer, capsys):
    class_labels(tmp_path / "d.parquet")
    assert targets(tmp_path, tokenizer) == (["negative", "positive"], [1, 0, 0, 1])
    for labels, wanted in ((["negative", "positive"], [1, 0, 0, 1]), (["Positive", "Negative"], [0, 1, 1, 0])):
        assert targets(tmp_path, tokenizer, labels) == (labels, wanted)
    assert "class ids" not in capsys.readouterr().err
    with pytest.raises(InputError, match="label 'positive' in validation row 1 is unknown; wanted one of neg, pos"):
        targets(tmp_path, tokenizer, ["neg", "pos"])


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["0", "1"]])
def test_class_ids_are_those_of_a_model_that_has_no_names(tmp_path, tokenizer, labels):
    class_labels(tmp_path / "d.parquet")
    assert targets(tmp_path, tokenizer, labels) == (labels, [0, 1, 1, 0])
    class_labels(tmp_path / "d.parquet", names=["1", "2"])  # of stars
    assert targets(tmp_path, tokenizer, labels) == (labels, [0, 1, 1, 0])
    assert targets(tmp_path, tokenizer, ["1", "2", "3"]) == (["1", "2", "3"], [0, 1, 1, 0])


def test_the_names_of_a_hub_data_set(tokenizer, monkeypatch):
    data = {"text": ["a film", "a book"] * 2, "label": [0, 1, 1, 0]}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(data, datasets.Features(NAMED))
    )
    task = load_task("mine", own(data="some/reviews"), tokenizer)
    assert (task.labels, task.train.targets.tolist()) == (["negative", "positive"], [1, 0, 0, 1])


def test_known_tasks_keep_their_ids(tmp_path, tokenizer):
    sst2(tmp_path / "plain")
    plain = load_task("sst2", recipe.Task(data="plain", max_length=16), tokenizer, data_root=tmp_path)
    for names in (["negative", "positive"], ["neg", "pos"], ["0", "1"]):
        for split in ("train", "validation"):
            class_labels(tmp_path / "named" / f"{split}.parquet", names=names, text="sentence")
        task = load_task("sst2", recipe.Task(data="named", max_length=16), tokenizer, data_root=tmp_path)
        assert (task.labels, task.train.targets.tolist()) == (plain.labels, [0, 1, 1, 0]), names
    class_labels(tmp_path / "named" / "train.parquet", text="sentence")  # their names in another order
    task = load_task("sst2", recipe.Task(data="named", max_length=16), tokenizer, data_root=tmp_path)
    assert (task.labels, task.train.targets.tolist()) == (plain.labels, [1, 0, 0, 1])
    class_labels(tmp_path / "named" / "validation.parquet", [-1, -1], ["negative", "positive"], "sentence")
    with pytest.raises(InputError, match="label -1 in validation row 1: the split has no labels; use another"):
        load_task("sst2", recipe.Task(data="named", max_length=16), tokenizer, data_root=tmp_path)


def test_class_ids_without_a_name(tmp_path, tokenizer):
    class_labels(tmp_path / "d.parquet", [0, 1, -1])
    with pytest.raises(InputError, match="label column 'label' is empty in row 3; remove the row"):
        targets(tmp_path, tokenizer)
    class_labels(tmp_path / "d.parquet", [0, 2])
    message = "label 2 in row 2 of column 'label' is none of the ids 0 to 1 of the file's names positive, negative"
    with pytest.raises(InputError, match=message):
        targets(tmp_path, tokenizer)


def test_files_with_different_names_are_not_joined(tmp_path, tokenizer):
    for name, names in (("a", ["x", "y"]), ("b", ["y", "x"]), ("c", ["x", "y"])):
        class_labels(tmp_path / f"{name}.parquet", names=names)
    write(tmp_path / "plain.parquet", [{"text": "film", "label": 1}])
    shared = {"validation": "a.parquet"}
    assert targets(tmp_path, tokenizer, data=["plain.parquet", "a.parquet", "c.parquet"], **shared)[0] == ["x", "y"]
    with pytest.raises(InputError, match="tasks.mine: the files have different names for their class ids; write them"):
        targets(tmp_path, tokenizer, data=["a.parquet", "b.parquet"], **shared)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_one_split_says_the_names_for_all(tmp_path, tokenizer, suffix):
    class_labels(tmp_path / "d.parquet")
    write(tmp_path / f"ids{suffix}", [{"text": "film", "label": label} for label in (1, 0, 1)])
    wanted = ["negative", "positive"]
    assert targets(tmp_path, tokenizer, validation=f"ids{suffix}") == (wanted, [0, 1, 0])
    assert targets(tmp_path, tokenizer, data=f"ids{suffix}") == (wanted, [1, 0, 0, 1])
    write(tmp_path / f"names{suffix}", [{"text": "film", "label": label} for label in ("negative", "positive")])
    assert targets(tmp_path, tokenizer, validation=f"names{suffix}") == (wanted, [0, 1])
    class_labels(tmp_path / "other.parquet", names=["x", "y"])
    with pytest.raises(InputError, match="the splits have different names for their class ids"):
        targets(tmp_path, tokenizer, validation="other.parquet")


def test_names_beside_a_feature_that_is_a_list(tmp_path, tokenizer):
    class_labels(tmp_path / "d.parquet")
    table = pa.parquet.read_table(tmp_path / "d.parquet")
    described = json.loads(table.schema.metadata[b"huggingface"])
    described["info"]["features"]["spans"] = [{"a": {"dtype": "int64", "_type": "Value"}}]
    spans = pa.array([[{"a": 1}]] * table.num_rows)
    table = table.append_column("spans", spans).replace_schema_metadata(
        {b"huggingface": json.dumps(described).encode()}
    )
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    assert targets(tmp_path, tokenizer)[0] == ["negative", "positive"]


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": [1]}}', b'{"info": {"features": {"a": 1}}}'])
def test_metadata_of_another_program_are_left_alone(tmp_path, tokenizer, metadata):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]}, metadata={b"huggingface": metadata})
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    assert targets(tmp_path, tokenizer) == (["0", "1"], [0, 1])


def test_numbers_that_are_taken_as_class_ids_are_said(tmp_path, tokenizer, capsys):
    write(tmp_path / "d.parquet", [{"text": "film", "label": label} for label in (1, 2, 1)])
    stars = ["1 star", *(f"{count} stars" for count in range(2, 6))]
    assert targets(tmp_path, tokenizer, stars)[1] == [1, 2, 1]
    line = "tasks.mine: labels 1, 2 of the validation rows are taken as class ids: 0 = 1 star, 1 = 2 stars, 2 = 3 stars"
    assert capsys.readouterr().err == f"{line}, 3 = 4 stars, 4 = 5 stars\n"
    with pytest.raises(InputError, match="label '1' in validation row 1 is unknown; wanted one of bad, good"):
        targets(tmp_path, tokenizer, ["bad", "good"])
    targets(tmp_path, tokenizer, ["1", "2"])  # its names
    targets(tmp_path, tokenizer)  # those of a model to be trained
    assert capsys.readouterr().err == ""


def test_labels_of_bytes(tmp_path, tokenizer):
    write(tmp_path / "d.parquet", [{"text": "film", "label": label} for label in (b"neg", "schön".encode(), b"neg")])
    assert targets(tmp_path, tokenizer) == (["neg", "schön"], [0, 1, 0])
    write(tmp_path / "d.parquet", [{"text": "film", "label": label} for label in (b"neg", b"\xff")])
    with pytest.raises(InputError, match="'label' holds bytes that are not UTF-8 in row 2, wanted strings or numbers"):
        targets(tmp_path, tokenizer)
