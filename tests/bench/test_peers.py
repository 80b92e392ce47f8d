"""Every peer gives what torch gives; how their processes answer and end."""

import json
import os
import signal
import sys

import numpy as np
import pytest

from pruneofa.bench import measure, peers
from pruneofa.bench import records as bench_records
from pruneofa.bench.models import Settings
from pruneofa.bench.peers import PEERS, PRUNEOFA
from pruneofa.bench.workers import TimeLimitError, Worker, WorkerError
from pruneofa.errors import InputError
from tests.bench.records import needs_kernels
from tests.tiny import write_folder

EXPORTED = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "deepsparse")


def test_a_process_that_dies_says_how(tmp_path):
    with Worker(PRUNEOFA, tmp_path / "log", os.environ) as worker:
        with pytest.raises(WorkerError, match="KeyError: 'nobody'"):
            worker.ask("time", key="nobody", count=1)
        worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match="its process ended with -9"):
            worker.ask("memory")


def test_another_interpreter_needs_nothing_of_ours(tmp_path):
    with Worker("deepsparse", tmp_path / "log", os.environ, sys.executable) as worker:
        assert 1e6 < worker.ask("memory")["peak"] < 1e9


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    with Worker(PRUNEOFA, tmp_path / "log", os.environ, limit=0.001) as worker:
        with pytest.raises(TimeLimitError, match=r"took longer than the 0\.001 seconds of --limit to memory"):
            worker.ask("memory")
        assert worker._process.wait(5) == -signal.SIGKILL
    with pytest.raises(InputError, match="limit is 0 seconds, wanted more than 0"):
        measure.Bench(Settings(limit=0))


def test_long_runs_need_no_run_before_them(monkeypatch):
    ran, process = [], peers.Process()
    process.runs["x"] = lambda: ran.append(1)
    monkeypatch.setattr(peers, "LONG", -1.0)
    for runs in (3, 5):  # one that does not count, then never again
        process.time("x", 2)
        assert len(ran) == runs


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("together", [None, 1, 2, 3, 5, 8])
def test_a_batch_in_parts_has_every_token_once_and_comes_back_in_order(tmp_path, together, padded):
    random = np.random.default_rng(0)
    lengths = np.array([4, 9, 1, 9, 6]) if padded else np.full(5, 7)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": random.integers(1, 99, mask.shape) * mask} | ({"attention_mask": mask} if padded else {})
    np.savez(tmp_path / "inputs.npz", **inputs)
    job = {"inputs": str(tmp_path / "inputs.npz"), "together": together}
    parts = [part for _, part in peers.batches(job)]
    assert [len(part["input_ids"]) for part in parts[:-1]] == [together or 5] * (len(parts) - 1)
    computed = sum(part["input_ids"].size for part in parts)
    assert computed == (lengths.sum() if together == 1 else computed) <= mask.size
    states = [np.repeat(part["input_ids"][..., None], 3, axis=2) for part in parts]
    np.testing.assert_array_equal(peers.joined(job, states)[..., 0], inputs["input_ids"])


@needs_kernels
@pytest.mark.parametrize(  # in one run: every process takes seconds to start, and every export to make
    "torch", [("torch-int8",), pytest.param(("torch-fp32", "torch-bf16", "torch-int8"), marks=pytest.mark.slow)]
)
@pytest.mark.timeout(900)
def test_peers_and_a_second_model_are_verified_timed_and_described(folder, tmp_path, torch):
    pytest.importorskip("torch", reason="outputs are verified against torch, which is not installed")
    dies = {} if PEERS["deepsparse"].missing(elsewhere=True) else {"deepsparse": "/bin/false"}
    names = (*torch, *(name for name in EXPORTED if name not in dies and not PEERS[name].missing()))
    also = (str(write_folder(tmp_path / "other", "Model")),)
    settings = Settings(
        path=str(folder), also=also, mixed=("3x4-9",), threads=1, repeats=2, peers=(*names, *dies), pythons=dies
    )
    found = bench_records.run(settings)
    json.dumps(found)
    [row] = found["rows"]
    assert (row["case"], row["fastest"] in (PRUNEOFA, *names)) == ("3x4-9", True)
    assert [one["name"] for one in row["runners"]] == [PRUNEOFA, f"{PRUNEOFA} 2: other", *names]
    ours, other, first, *_ = row["runners"]
    assert 0 < ours["error"] < 0.15 and other["error"] == ours["error"]
    assert first["error"] == 0 if torch[0] == "torch-fp32" else 0 < first["error"] < 0.15
    for one in row["runners"]:
        assert one["verified"] and len(one["seconds"]) == 2 and 0 < one["p10_ms"] <= one["median_ms"] <= one["p90_ms"]
        assert one["peak"] >= one["baseline"] > 1e6 and one["first_answer"] >= one["load"] > 0 and one["disk"] > 1e3
        assert one["together"] in (measure.TOGETHER if PEERS[one["peer"]].divides else [None])
    assert found["models"][0]["layers"] == 2 and found["machine"]["cpus"] >= 1 and found["versions"]["numpy"]
    if dies:  # what exports the model for it is installed
        assert "3x4-9: its process ended with 1" in found["left_out"].pop("deepsparse")
    assert found["left_out"] == {}


def test_all_peers_are_among_those_tests():
    assert set(PEERS) == {PRUNEOFA, "torch-fp32", "torch-bf16", "torch-int8", *EXPORTED}
