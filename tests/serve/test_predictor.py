"""The predictor of batches, and the same under Ray Data and Spark where they are installed."""

import functools
import os
import shutil
import signal
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from pruneofa.errors import InputError
from pruneofa.serve.predictor import Predictor, entities, predict_frames, spark_columns
from tests.tiny import write_folder

TEXTS = ["a good film", "a terrible story", "the king of the city", "water"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model") / "classifier"))


@pytest.fixture(scope="module")
def expected(model):
    return Predictor(model, threads=1).engine.predict(TEXTS)


def test_a_batch_comes_back_as_it_was_given(model, expected):
    predictor = Predictor(model, threads=1)
    labels = [row["label"] for row in expected]
    frame = predictor(pd.DataFrame({"text": TEXTS, "n": range(4)}))
    assert list(frame) == ["text", "n", "label", "score", "scores"] and list(frame["label"]) == labels
    table = predictor(pa.table({"text": TEXTS}))
    assert isinstance(table, pa.Table) and table.column("label").to_pylist() == labels
    arrays = predictor({"text": np.array(TEXTS)})
    assert list(arrays["label"]) == labels and arrays["score"].dtype == np.float64


def test_a_row_without_text_is_named_or_skipped(model):
    frame = pd.DataFrame({"text": ["a film", None]})
    with pytest.raises(InputError, match="row 2 of the batch is float, wanted text; .*--skip-bad"):
        Predictor(model, threads=1)(frame)
    assert list(Predictor(model, threads=1, skip_bad=True)(frame)["label"].isna()) == [False, True]


def test_what_is_wrong_with_the_model_is_not_a_row_to_skip(model, tmp_path):
    folder = tmp_path / "overflowing"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for skip_bad in (False, True):
        with pytest.raises(InputError, match=r"^the batch: its result is NaN or infinite"):
            Predictor(str(folder), threads=1, skip_bad=skip_bad)(pd.DataFrame({"text": TEXTS}))


def test_the_part_of_a_pair_that_is_wrong_is_named(model):
    frame = pd.DataFrame({"text": ["a film"], "other": [""]})
    with pytest.raises(InputError, match="row 1 of the batch: the second text is an empty string, wanted text; omit"):
        Predictor(model, text="text", text_pair="other", threads=1)(frame)


BATCHES = [["a film"] * 2, ["a film", None], [None, None], []]


@pytest.mark.parametrize("task", ["classification", "answers", "vectors"])
def test_columns_have_one_type_whatever_is_in_the_batch(model, tmp_path, task):
    heads = {"answers": "ForQuestionAnswering", "vectors": "Model"}
    folder = write_folder(tmp_path / task, heads[task]) if task in heads else model
    columns = ["question", "context"] if task == "answers" else ["text"]
    predictor = Predictor(str(folder), threads=1, skip_bad=True)
    arrays, frames, tables = [], [], []
    for texts in BATCHES:
        arrays.append(predictor({name: np.array(texts, object) for name in columns}))
        frames.append(predictor(pd.DataFrame({name: texts for name in columns}, index=[7] * len(texts), dtype=object)))
        tables.append(predictor(pa.table({name: pa.array(texts, pa.string()) for name in columns})))
    assert len({tuple((array.dtype, array.shape[1:]) for array in batch.values()) for batch in arrays}) == 1
    assert [frame.dtypes.to_list() for frame in frames] == [frames[0].dtypes.to_list()] * 4
    assert [table.schema for table in tables] == [tables[0].schema] * 4
    for name in predictor.added:
        assert [len(batch[name]) for batch in arrays] == [2, 2, 2, 0]
        assert list(frames[1][name].isna()) == [False, True]
    if task == "vectors":
        assert arrays[1]["embedding"].dtype == np.float32 and arrays[3]["embedding"].shape == (0, 32)
        assert np.isnan(arrays[1]["embedding"]).all(1).tolist() == [False, True]
    elif task == "answers":
        assert arrays[1]["start"].dtype == np.int64 and arrays[1]["end"][1] == -1
    else:
        assert np.isnan(arrays[1]["score"]).tolist() == [False, True] and arrays[1]["label"][1] is None


def test_a_column_of_texts_that_is_there_twice_is_refused(model):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    with pytest.raises(InputError, match="the table: the name 'text' is that of two columns; rename one"):
        Predictor(model, threads=1)(table)


def test_entities_are_groups_of_tokens():
    text = "Ada Lovelace met Bo in Paris"
    words = [("Ada", "B-PER"), ("Lovelace", "I-PER"), ("met", "O"), ("Bo", "B-PER"), ("in", "O"), ("Paris", "I-LOC")]
    tokens, at = [], 0
    for word, label in words:
        start = text.index(word, at)
        at = start + len(word)
        tokens.append({"label": label, "score": 0.5 + 0.1 * len(tokens), "word": word, "start": start, "end": at})
    assert [(found["label"], found["word"], round(found["score"], 3)) for found in entities(text, tokens)] == [
        ("PER", "Ada Lovelace", 0.55),
        ("PER", "Bo", 0.8),
        ("LOC", "Paris", 1.0),
    ]
    assert [found["word"] for found in entities("ab", [
        {"label": "B-X", "score": 1.0, "word": "a", "start": 0, "end": 1},
        {"label": "B-X", "score": 1.0, "word": "b", "start": 1, "end": 2},
    ])] == ["a", "b"]  # fmt: skip


def test_frames_of_a_partition(model, expected):
    frames = [pd.DataFrame({"text": TEXTS[:1]}), pd.DataFrame({"text": TEXTS[1:]})]
    found = pd.concat(predict_frames(frames, model=model, threads=1))
    assert list(found["label"]) == [row["label"] for row in expected]
    assert spark_columns(model, prefix="p_") == "`p_label` string, `p_score` double, `p_scores` map<string, double>"


def die_once(marker):
    """End this process, as the out-of-memory killer does, unless `marker` exists: the first to come makes it."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(Predictor):
    """A predictor whose process is killed in the middle, once."""

    def __init__(self, marker, **settings):
        super().__init__(**settings)
        self._marker, self._batches = marker, 0

    def __call__(self, batch):
        self._batches += 1
        if self._batches == 2:
            die_once(self._marker)
        return super().__call__(batch)


def mortal_frames(frames, marker, **settings):
    for number, frame in enumerate(predict_frames(frames, **settings)):
        if number == 1:
            die_once(marker)
        yield frame


@pytest.mark.slow
def test_ray_data_with_two_actors_of_which_one_is_killed(model, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    try:
        marker = tmp_path / "killed"
        dataset = ray.data.from_items([{"id": i, "text": TEXTS[i % 4]} for i in range(400)]).repartition(8)
        done = dataset.map_batches(
            Mortal,
            fn_constructor_kwargs={"marker": str(marker), "model": model, "threads": 1},
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_size=20,
        )
        rows = done.take_all()
    finally:
        ray.shutdown()
    assert marker.exists()
    expected = {
        text: result["label"] for text, result in zip(TEXTS, Predictor(model).engine.predict(TEXTS), strict=True)
    }
    assert sorted(row["id"] for row in rows) == list(range(400))
    assert all(row["label"] == expected[row["text"]] for row in rows)


@pytest.mark.slow
def test_spark_with_two_workers_of_which_one_is_killed(model, expected, tmp_path, monkeypatch):
    sql = pytest.importorskip("pyspark.sql")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)  # else the first python3 of PATH
    spark = (
        sql.SparkSession.builder.master("local[2,3]")  # two threads; a task may fail twice
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 20)
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    try:
        marker = tmp_path / "killed"
        frame = spark.createDataFrame([(i, TEXTS[i % 4]) for i in range(400)], "id bigint, text string").repartition(4)
        predict = functools.partial(mortal_frames, marker=str(marker), model=model, threads=1)
        rows = frame.mapInPandas(predict, f"id bigint, text string, {spark_columns(model)}").collect()
    finally:
        spark.stop()
    assert marker.exists()
    labels = {text: result["label"] for text, result in zip(TEXTS, expected, strict=True)}
    assert sorted(row["id"] for row in rows) == list(range(400))
    assert all(row["label"] == labels[row["text"]] for row in rows)
    assert all(set(row["scores"]) == {"label 0", "label 1", "label 2"} for row in rows)
