"""What is computed of measurements."""

import math

import numpy as np
import pytest

from pruneofa.bench import figures
from pruneofa.bench.peers import PRUNEOFA
from pruneofa.errors import CheckFailed
from tests.bench.records import record, runner


def test_the_median_of_ours_is_what_the_others_are_compared_with():
    row = record(runner(PRUNEOFA, 2), runner("torch-int8", 8), runner("openvino-int8", 6), runner("deepsparse", 5))
    [row] = row["rows"]
    assert (row["fastest"], row["fastest_dense"], row["ratio"]) == ("deepsparse", "openvino-int8", pytest.approx(3))
    assert [r["ratio"] for r in row["runners"]] == pytest.approx([1, 4, 3, 2.5])
    assert row["tera_per_second"] == pytest.approx(0.5) and row["share_of_peak"] == pytest.approx(0.5 / 14)


def test_statistics_are_in_milliseconds():
    found = figures.statistics([k / 1e3 for k in range(1, 102)])
    assert (found["median_ms"], found["p10_ms"], found["p90_ms"]) == pytest.approx((51, 11, 91))
    assert len(found["seconds"]) == 101


def test_too_slow_a_row_fails_and_a_sparse_peer_has_to_be_beaten_only():
    fast = record(runner(PRUNEOFA, 2), runner("torch-int8", 7), runner("deepsparse", 2.5))
    figures.check_ratio(fast, 3)
    with pytest.raises(CheckFailed, match=r"wanted 4 times .* 1x128: 3\.50 times as fast as torch-int8"):
        figures.check_ratio(fast, 4)
    with pytest.raises(CheckFailed, match="1x128: 0.50 times as fast as deepsparse"):
        figures.check_ratio(record(runner(PRUNEOFA, 2), runner("torch-int8", 7), runner("deepsparse", 1)), 3)
    with pytest.raises(CheckFailed, match="1x128: no peer to compare with"):
        figures.check_ratio(record(runner(PRUNEOFA, 2)), 3)


@pytest.mark.parametrize(
    ("kind", "error"), [("fp32", 0.25), ("int8", 0.5 / math.sqrt(8)), ("bf16", 0.5 / math.sqrt(8))]
)
def test_errors_are_relative_and_padding_does_not_count(kind, error):
    wanted = np.array([[[2, 0], [2, 0], [5, 5]]], np.float32)
    got = np.array([[[2, 0.5], [2, 0], [9, 9]]], np.float32)
    assert figures.error_of(got, wanted, kind, np.array([[True, True, False]])) == pytest.approx(error)
    assert figures.error_of(got[:, :2], wanted, kind) == math.inf
