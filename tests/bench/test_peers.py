"""Every peer gives what torch gives; how their processes answer and end."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from pruneofa.bench import measure
from pruneofa.bench.models import Settings
from pruneofa.bench.peers import PEERS, PRUNEOFA
from pruneofa.bench.workers import TimeLimitError, Worker, WorkerError
from pruneofa.errors import InputError
from tests.bench.records import needs_kernels
from tests.tiny import write_folder


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
    from pruneofa.bench import peers

    ran, process = [], peers._Process()
    process.runs["x"] = lambda: ran.append(1)
    monkeypatch.setattr(peers, "LONG", -1.0)
    for runs in (3, 5):  # one that does not count, then never again
        process.time("x", 2)
        assert len(ran) == runs


@pytest.fixture(scope="module")
def outputs_of_torch():
    return {}


@pytest.fixture
def one_reference(outputs_of_torch, monkeypatch):
    """What torch computes of an input with some weights is asked for once, since its process takes long to start."""
    reference = measure.Bench._reference

    def once(bench, job, root):
        key = Path(job["inputs"]).name, (Path(job["folder"]) / "model.safetensors").read_bytes()
        if key not in outputs_of_torch:
            outputs_of_torch[key] = reference(bench, job, root)
        return outputs_of_torch[key]

    monkeypatch.setattr(measure.Bench, "_reference", once)


@needs_kernels
@pytest.mark.parametrize(  # every process of torch takes seconds to start
    "peers", [("torch-int8",), pytest.param(("torch-fp32", "torch-bf16", "torch-int8"), marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("one_reference")
def test_torch_and_a_second_model_are_verified_timed_and_described(folder, tmp_path, peers):
    pytest.importorskip("torch", reason="outputs are verified against torch, which is not installed")
    dies = {} if PEERS["deepsparse"].missing(elsewhere=True) else {"deepsparse": "/bin/false"}
    also = (str(write_folder(tmp_path / "other", "Model")),)
    settings = Settings(
        path=str(folder), also=also, mixed=("3x4-9",), threads=1, repeats=2, peers=(*peers, *dies), pythons=dies
    )
    found = measure.run(settings)
    json.dumps(found)
    [row] = found["rows"]
    assert (row["case"], row["fastest"] in (PRUNEOFA, *peers)) == ("3x4-9", True)
    assert [one["name"] for one in row["runners"]] == [PRUNEOFA, f"{PRUNEOFA} 2: other", *peers]
    ours, other, torch, *_ = row["runners"]
    assert 0 < ours["error"] < 0.15 and other["error"] == ours["error"]
    assert torch["error"] == 0 if peers[0] == "torch-fp32" else 0 < torch["error"] < 0.15
    for one in row["runners"]:
        assert one["verified"] and len(one["seconds"]) == 2 and 0 < one["p10_ms"] <= one["median_ms"] <= one["p90_ms"]
        assert one["peak"] >= one["baseline"] > 1e6 and one["first_answer"] >= one["load"] > 0 and one["disk"] > 1e3
    assert found["models"][0]["layers"] == 2 and found["machine"]["cpus"] >= 1 and found["versions"]["numpy"]
    if dies:  # what exports the model for it is installed
        assert "3x4-9: its process ended with 1" in found["left_out"].pop("deepsparse")
    assert found["left_out"] == {}


@needs_kernels
@pytest.mark.usefixtures("one_reference")
@pytest.mark.parametrize(
    "names",
    [("onnxruntime", "onnxruntime-int8"), ("openvino",), ("openvino-int8",), ("deepsparse",)],
    ids=lambda names: names[0],
)
def test_a_peer_that_takes_an_export_gives_what_torch_gives(folder, names):
    if missing := PEERS[names[-1]].missing():
        pytest.skip(f"{names[-1]} needs {', '.join(missing)}, not installed")
    found = measure.run(Settings(path=str(folder), mixed=("3x4-9",), threads=1, repeats=1, peers=names))
    assert found["left_out"] == {}
    assert [one["verified"] for one in found["rows"][0]["runners"]] == [True] * (1 + len(names))


def test_all_peers_are_among_those_tests():
    exported = {"onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "deepsparse"}
    assert set(PEERS) == {PRUNEOFA, "torch-fp32", "torch-bf16", "torch-int8"} | exported
