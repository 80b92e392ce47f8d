"""Metrics, the terms of their rows, and the difference of two models with its standard error."""

import contextlib
import io
import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from pruneofa.errors import InputError
from pruneofa.train.metrics import classification_metrics, load_rows, lost, save_rows, squad_metrics

# (prediction, gold answers, exact match, F1) by the official evaluate-v1.1.py
OFFICIAL = [
    ("the cat", ["cat"], 100, 100),  # articles do not count
    ("An  Apple, a day!", ["apple day"], 100, 100),  # nor do punctuation, case and spaces
    ("U.S.", ["us"], 100, 100),  # punctuation goes without leaving a space
    ("Eiffel-Tower", ["Eiffel Tower"], 0, 0),
    ("in 1999", ["1999"], 0, 200 / 3),  # precision 1/2, recall 1
    ("in 1999", ["1999", "in 1999."], 100, 100),  # the best over the gold answers
    ("red red blue", ["red blue blue"], 0, 200 / 3),  # words count as often as they occur in both
    ("one two three four", ["two three", "three four five six"], 0, 200 / 3),
    ("", ["something"], 0, 0),
]


@pytest.mark.parametrize(("prediction", "golds", "exact_match", "f1"), OFFICIAL)
def test_official_metrics(prediction, golds, exact_match, f1):
    assert squad_metrics([prediction], [golds]).values == {
        "exact_match": pytest.approx(exact_match), "f1": pytest.approx(f1, abs=1e-4),
    }  # fmt: skip


def test_metrics_are_means_over_questions():
    predictions, golds, exact_match, f1 = zip(*OFFICIAL, strict=True)
    result = squad_metrics(predictions, golds)
    assert result.values == {
        "exact_match": pytest.approx(np.mean(exact_match), abs=1e-4), "f1": pytest.approx(np.mean(f1), abs=1e-4),
    }  # fmt: skip
    assert all(terms.shape == (len(OFFICIAL),) for terms in result.rows.values())
    np.testing.assert_allclose(result.rows["f1"], f1, rtol=1e-6)


def answers(seed, rows=400, classes=4):
    draw = np.random.default_rng(seed)
    targets = draw.integers(classes, size=rows)
    return targets, np.where(draw.random(rows) < 0.7, targets, draw.integers(classes, size=rows))


@pytest.mark.parametrize("task", ["mine", "qqp", "sst2"])
def test_metrics_of_classes_are_those_of_scikit_learn(task):
    targets, predicted = answers(0, classes=4 if task == "mine" else 2)
    found = classification_metrics(task, ["not_duplicate", "duplicate"], targets, predicted)
    wanted = {"accuracy": accuracy_score(targets, predicted)}
    if task != "sst2":
        wanted["f1"] = f1_score(targets, predicted, average="macro" if task == "mine" else "binary")
    assert found.values == {name: pytest.approx(100 * value) for name, value in wanted.items()}
    for name, terms in found.rows.items():
        assert terms.dtype == np.float32 and terms.mean(dtype=np.float64) == pytest.approx(found.values[name], rel=1e-6)


def test_a_class_that_is_never_right_counts_as_nought_and_an_absent_one_does_not_count():
    targets, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])
    found = classification_metrics("mine", ["a", "b", "c"], targets, predicted)
    assert found.values["f1"] == pytest.approx(100 * f1_score(targets, predicted, average="macro", zero_division=0))
    none = classification_metrics("qqp", ["not_duplicate", "duplicate"], np.zeros(3, int), np.zeros(3, int))
    assert none.values == {"accuracy": 100.0, "f1": 0.0}


def test_the_terms_of_f1_give_its_standard_error():
    """Against the spread of F1 over many samples of rows."""
    spread, estimates = [], []
    for seed in range(300):
        found = classification_metrics("mine", list("abcd"), *answers(seed))
        spread.append(found.values["f1"])
        estimates.append(found.rows["f1"].std(ddof=1) / math.sqrt(400))
    assert np.mean(estimates) == pytest.approx(np.std(spread, ddof=1), rel=0.15)


def test_what_is_lost_and_its_standard_error():
    dense = {0: np.array([100, 100, 100, 0], np.float32), 1: np.array([100, 100, 0, 100], np.float32)}
    sparse = {0: np.array([100, 0, 100, 0], np.float32), 1: np.array([100, 0, 0, 0], np.float32)}
    one = lost({0: dense[0]}, {0: sparse[0]})
    assert one == {"mean": 25.0, "standard_error": pytest.approx(math.sqrt(2500 / 4))}  # one of four rows differs
    both = lost(dense, sparse)
    rows = np.array([0, 100, 0, 50])  # the mean difference of each row; the seeds differ by no more than rows explain
    assert both["mean"] == pytest.approx(37.5)
    assert both["standard_error"] == pytest.approx(math.sqrt(rows.var(ddof=1) / 4))


@pytest.mark.parametrize(("row", "seed"), [(0, 0), (3, 0), (0, 1), (3, 1)])
def test_the_standard_error_over_rows_and_seeds_is_the_spread_of_many_runs(row, seed):
    """Effects of rows, of seeds and of both together, whose standard deviations are `row`, `seed` and 5."""
    draw, rows, seeds, found = np.random.default_rng(0), 60, 4, []
    for _ in range(400):
        effects = (
            row * draw.normal(size=rows) + seed * draw.normal(size=(seeds, 1)) + 5 * draw.normal(size=(seeds, rows))
        )
        nothing = np.zeros(rows, np.float32)
        found.append(lost({0: nothing}, dict(enumerate(-effects.astype(np.float32)))))
    spread = np.std([each["mean"] for each in found], ddof=1)
    estimated = math.sqrt(np.mean([each["standard_error"] ** 2 for each in found]))
    assert spread * 0.9 < estimated < spread * 1.25


def test_one_dense_model_is_compared_with_all_seeds_and_other_rows_with_nothing():
    dense = {0: np.array([100, 0], np.float32)}
    assert lost(dense, {0: dense[0], 1: dense[0]}) == {"mean": 0.0, "standard_error": 0.0}
    assert lost(dense, {0: np.zeros(3, np.float32)}) is lost({}, dense) is lost(dense, {}) is None


def test_equal_answers_differ_by_nothing_where_two_metrics_alone_would_say_little():
    """Each accuracy has a standard error of 2 points; their difference is known to a tenth of it."""
    draw = np.random.default_rng(0)
    dense = (100.0 * (draw.random(500) < 0.8)).astype(np.float32)
    sparse = dense.copy()
    sparse[np.flatnonzero(dense)[0]] = 0
    found = lost({0: dense}, {0: sparse})
    assert found == {"mean": pytest.approx(0.2), "standard_error": pytest.approx(0.2, rel=0.01)}


def test_rows_are_stored_and_read_back(tmp_path):
    found = classification_metrics("mine", list("abcd"), *answers(3))
    save_rows(tmp_path / "rows.npz", found)
    stored = load_rows(tmp_path / "rows.npz")
    assert set(stored) == {"accuracy", "f1"}
    for name, terms in stored.items():
        np.testing.assert_array_equal(terms, found.rows[name])
    assert load_rows(tmp_path / "absent.npz") == {}


def test_rows_that_are_damaged_are_named(tmp_path):
    file = tmp_path / "rows.npz"
    save_rows(file, classification_metrics("mine", list("abcd"), *answers(3)))
    whole = file.read_bytes()
    arrays = [io.BytesIO() for _ in range(3)]
    np.savez(arrays[0], accuracy=np.array(["a"]))
    np.savez(arrays[1], accuracy=np.array([{}], object))
    np.save(arrays[2], np.zeros(3, np.float32))
    stored = bytes(byte ^ 0xFF if 60 < at < 90 else byte for at, byte in enumerate(whole))
    for damaged in (whole[:50], whole[:-30], b"", b"PK", stored, *(array.getvalue() for array in arrays)):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"rows\.npz: damaged, wanted the terms of the metrics of every row; copy"):
            load_rows(file)


def test_a_flipped_bit_is_no_other_error(tmp_path):
    file = tmp_path / "rows.npz"
    save_rows(file, classification_metrics("mine", list("abcd"), *answers(3)))
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 64):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with contextlib.suppress(InputError):  # or nothing that is read has changed
                load_rows(file)
