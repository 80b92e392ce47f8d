"""What a benchmark measured, made up."""

import pytest

from pruneofa.bench import figures
from pruneofa.bench.models import Case
from pruneofa.bench.peers import PEERS, PRUNEOFA
from pruneofa.bench.records import FORMAT
from pruneofa.engine import engine

needs_kernels = pytest.mark.skipif(engine.native is None, reason="the native kernels were not built")


def runner(name: str, milliseconds: float, **fields) -> dict:
    peer = PEERS.get(name, PEERS[PRUNEOFA])
    known = {"name": name, "peer": peer.name, "kind": peer.kind, "dense": peer.dense, "error": 0.01, "verified": True}
    sizes = {"tolerance": 0.1, "peak": 3e6, "baseline": 1e6, "disk": 2e6, "load": 0.1, "first_answer": 0.2}
    return known | sizes | figures.statistics([milliseconds / 1e3] * 3) | fields


def limits(before: float = 14, after: float | None = 14, memory: float = 20) -> dict:
    """Ceilings of a machine before and after a row, 10^12 operations per second and GB/s of memory at first."""
    figures = [
        {"tera_per_second": tera, "l2_gb_per_second": 100.0, "memory_gb_per_second": gb}
        for tera, gb in ((before, memory), (after, 20))
    ]
    of = [{"one_thread": each, "all_threads": each} for each in figures]
    return {"l2_bytes": 1 << 20, "memory_bytes": 1 << 27, "before": of[0], "after": after and of[1]}


def record(*runners: dict, case: Case | None = None, ceilings: dict | None = None, **fields) -> dict:
    row = figures.summary(case or Case("1x128", (128,)), 10**9, list(runners), None, ceilings or limits())
    model = {
        "name": PRUNEOFA,
        "family": "bert",
        "sparsity": 0.9,
        "patterns": ["unstructured"],
        "layers": 12,
        "hidden": 768,
    }
    return {
        "format": FORMAT, "threads": 2, "isa": "amx", "capped": False, "rows": [row], "left_out": {},
        "break_even": [],
        "models": [model | {"precision": "int8"}], "machine": {"load_average": [0, 0], "cpus": 2},
    } | fields  # fmt: skip
