"""The figures of a record, from what was measured: errors, medians, ratios, and whether the engine is fast enough."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.bench.machine import measured_peak
from pruneofa.bench.models import Case
from pruneofa.bench.peers import PRUNEOFA
from pruneofa.errors import CheckFailed

# Error against torch fp32 of the same weights. fp32: largest difference over the largest value; else relative L2.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.15}


def error_of(got: NDArray[np.float32], wanted: NDArray[np.float32], kind: str, mask: Any = None) -> float:
    """Error of hidden states (batch, seq, hidden) where `mask` (batch, seq) is True, as `TOLERANCES` counts it."""
    if got.shape != wanted.shape:
        return math.inf
    if mask is not None:
        got, wanted = got[mask], wanted[mask]
    difference = got.astype(np.float64) - wanted
    if kind == "fp32":
        return float(np.abs(difference).max() / np.abs(wanted).max())
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


def statistics(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread in milliseconds, and the runs themselves."""
    low, median, high = (1e3 * float(np.percentile(seconds, q)) for q in (10, 50, 90))
    return {"median_ms": median, "p10_ms": low, "p90_ms": high, "seconds": list(seconds)}


def summary(
    case: Case, operations: int, runners: list[dict[str, Any]], peak: float | None, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """One row of a record: the first runner is pruneofa, the others get their ratio to it.

    Args:
        peak: what the user says is the machine's peak, 10^12 operations per second; None: what was measured.
        limits: `buffers`, and `ceilings` before and after the row; "after" is None while it is measured.
    """
    engine_ms = runners[0]["median_ms"]
    for row in runners:
        row["ratio"] = row["median_ms"] / engine_ms
        row["per_second"] = 1e3 * len(case.lengths) / row["median_ms"]
    peers = [row for row in runners if row["peer"] != PRUNEOFA]
    fastest = min(peers, key=lambda row: row["median_ms"], default=None)
    dense = min((row for row in peers if row["dense"]), key=lambda row: row["median_ms"], default=None)
    rate = operations / engine_ms / 1e9  # 10^12 per second
    return {
        "case": case.name,
        "batch": len(case.lengths),
        "tokens": sum(case.lengths),
        "operations": operations,
        "tera_per_second": rate,
        "share_of_peak": rate / (peak or measured_peak(limits)),
        "ceilings": dict(limits),
        "fastest": fastest and fastest["name"],
        "fastest_dense": dense and dense["name"],
        "ratio": dense and dense["ratio"],
        "runners": runners,
    }


def check_ratio(record: Mapping[str, Any], least: float) -> None:
    """Raise CheckFailed unless in every row the fastest dense peer takes at least `least` times pruneofa's time.

    A peer that also skips zeros (DeepSparse) only has to be slower than pruneofa.
    """
    slow = []
    for row in record["rows"]:
        if row["ratio"] is None:
            slow.append(f"{row['case']}: no peer to compare with")
            continue
        best = min(runner["ratio"] for runner in row["runners"] if runner["peer"] != PRUNEOFA)
        if row["ratio"] < least:
            slow.append(f"{row['case']}: {row['ratio']:.2f} times as fast as {row['fastest_dense']}")
        elif best < 1:
            slow.append(f"{row['case']}: {best:.2f} times as fast as {row['fastest']}")
    if slow:
        raise CheckFailed(f"wanted {least:g} times as fast as every dense peer; " + "; ".join(slow))
