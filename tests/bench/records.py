"""What a benchmark measured, made up."""

import pytest

from pruneofa.bench import measure
from pruneofa.bench.models import Case
from pruneofa.bench.peers import PEERS, PRUNEOFA
from pruneofa.engine import engine

needs_kernels = pytest.mark.skipif(engine.native is None, reason="the native kernels were not built")


def runner(name: str, milliseconds: float, **fields) -> dict:
    peer = PEERS.get(name, PEERS[PRUNEOFA])
    known = {"name": name, "peer": peer.name, "kind": peer.kind, "dense": peer.dense, "error": 0.01, "verified": True}
    sizes = {"tolerance": 0.1, "peak": 3e6, "baseline": 1e6, "disk": 2e6, "load": 0.1, "first_answer": 0.2}
    return known | sizes | measure.statistics([milliseconds / 1e3] * 3) | fields


def record(*runners: dict, case: Case | None = None, **fields) -> dict:
    row = measure.summary(case or Case("1x128", (128,)), 10**9, list(runners), 14.0)
    model = {"name": PRUNEOFA, "family": "bert", "sparsity": 0.9, "patterns": ["unstructured"]}
    model |= {"layers": 12, "hidden": 768}
    return {
        "format": measure.FORMAT, "isa": "amx", "capped": False, "rows": [row], "left_out": {}, "break_even": [],
        "models": [model | {"precision": "int8"}], "machine": {"load_average": [0, 0], "cpus": 2},
    } | fields  # fmt: skip
