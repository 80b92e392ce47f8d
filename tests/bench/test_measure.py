"""What a benchmark run measures, whom it leaves out, and what it keeps when it is ended."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pruneofa.bench import measure, tables
from pruneofa.bench import records as bench_records
from pruneofa.bench.models import Settings
from pruneofa.bench.peers import PEERS, PRUNEOFA
from pruneofa.bench.workers import TimeLimitError, Worker
from pruneofa.engine import engine
from pruneofa.errors import CheckFailed, InputError
from tests.bench.records import needs_kernels


def test_an_unknown_peer_is_named_with_the_nearest():
    with pytest.raises(InputError, match="peer 'openvno' is unknown, wanted .* or none; did you mean openvino"):
        measure.choose(Settings(peers=("openvno",)), None)
    with pytest.raises(InputError, match="'none' is unknown, wanted "):
        measure.choose(Settings(peers=("none", "openvino")), None)
    with pytest.raises(InputError, match="peer 'deepspars'"):
        measure.choose(Settings(pythons={"deepspars": sys.executable}), None)


def test_what_is_not_installed_is_listed_or_refused(monkeypatch):
    monkeypatch.setattr(measure.Peer, "missing", lambda peer, elsewhere=False: ["gone"] if "onnx" in peer.name else [])
    chosen, left_out = measure.choose(Settings(), None)
    assert left_out["onnxruntime"].startswith("not installed (gone): pip install torch transformers onnx onnxruntime")
    assert PRUNEOFA not in [peer.name for peer in chosen] and "torch-int8" in [peer.name for peer in chosen]
    with pytest.raises(InputError, match="peer onnxruntime: gone not installed; run: pip install "):
        measure.choose(Settings(peers=("onnxruntime",)), None)


@pytest.mark.parametrize(
    ("cap", "out"),
    [
        (None, set()),
        ("avx512bf16", {"onnxruntime", "onnxruntime-int8"}),
        ("avx512vnni", {"onnxruntime", "onnxruntime-int8"}),
        ("avxvnni", {"onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "deepsparse"}),
        ("avx2", {"onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"}),
        ("scalar", set(PEERS) - {PRUNEOFA}),
    ],
)
def test_a_peer_that_cannot_be_held_to_an_isa_is_left_out_by_name(monkeypatch, cap, out):
    monkeypatch.setattr(measure.Peer, "missing", lambda peer, elsewhere=False: [])
    chosen, left_out = measure.choose(Settings(), cap)
    assert left_out == {name: f"cannot be limited to {cap}" for name in out}
    assert {peer.name for peer in chosen} == set(PEERS) - {PRUNEOFA} - out


@needs_kernels
@pytest.mark.skipif("amx" not in engine.Engine.available_isas(), reason="the best path here is itself a cap")
def test_processes_are_held_to_the_isa_and_to_nothing_else(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setattr(engine.Engine, "available_isas", staticmethod(lambda: ["scalar", "avx2", "amx"]))
    bench = measure.Bench(Settings(threads=3))
    assert "ONEDNN_MAX_CPU_ISA" not in bench.environment(PEERS["torch-int8"])
    assert bench.environment(PEERS["torch-int8"])["OMP_NUM_THREADS"] == "3"
    assert bench.environment(PEERS[PRUNEOFA])["PATH"] == os.environ["PATH"]
    if "avx2" in engine.native.available_isas():
        capped = measure.Bench(Settings(isa="avx2")).environment(PEERS["torch-int8"])
        assert (capped["ONEDNN_MAX_CPU_ISA"], capped["ATEN_CPU_CAPABILITY"]) == ("AVX2", "avx2")


def stopping(monkeypatch, peer: str, do: str, nth: int, error: BaseException) -> None:
    """Let the nth request of this kind to a peer raise."""
    ask, asked = Worker.ask, []

    def stopped(worker, what, **arguments):
        if (worker.peer, what) == (peer, do):
            asked.append(what)
            if len(asked) == nth:
                raise error
        return ask(worker, what, **arguments)

    monkeypatch.setattr(Worker, "ask", stopped)


@needs_kernels
@pytest.mark.usefixtures("peers_without_torch")
@pytest.mark.parametrize("do", ["build", "time"])
def test_a_peer_over_its_limit_is_left_out_and_the_others_go_on(folder, monkeypatch, do):
    stopping(monkeypatch, "torch-bf16", do, 2 if do == "time" else 1, TimeLimitError("took longer"))
    peers = ("torch-fp32", "torch-bf16")
    found = bench_records.run(Settings(path=str(folder), seq=(4, 8), threads=1, repeats=4, peers=peers))
    assert found["left_out"] == {"torch-bf16": "1x4: took longer"} and found["complete"]
    for row in found["rows"]:
        assert [(one["name"], len(one["seconds"])) for one in row["runners"]] == [(PRUNEOFA, 4), ("torch-fp32", 4)]


@needs_kernels
@pytest.mark.usefixtures("peers_without_torch")
def test_ours_over_its_limit_is_an_error(folder, monkeypatch):
    stopping(monkeypatch, PRUNEOFA, "build", 1, TimeLimitError("took longer"))
    with pytest.raises(InputError, match="1x8: pruneofa took longer"):
        bench_records.run(Settings(path=str(folder), seq=(8,), threads=1, repeats=1, peers=()))


@needs_kernels
@pytest.mark.usefixtures("peers_without_torch")
def test_an_interrupt_leaves_the_record_of_what_was_measured(folder, tmp_path, monkeypatch):
    stopping(monkeypatch, PRUNEOFA, "time", 5, KeyboardInterrupt())
    file, kept = tmp_path / "out" / "record.json", []

    def keep(record):
        bench_records.write_record(record, file)
        kept.append(len(record["rows"]))

    with pytest.raises(KeyboardInterrupt):
        bench_records.run(Settings(path=str(folder), seq=(4, 8), threads=1, repeats=3, peers=()), keep=keep)
    [found] = tables.read_records([file])
    assert [(row["case"], len(row["runners"][0]["seconds"])) for row in found["rows"]] == [("1x4", 3), ("1x8", 1)]
    assert kept == [0, 1, 1, 1, 1, 2]  # once more with the ceilings after the first row
    said = tables.remarks(found)
    assert "fewer than 3 runs: pruneofa 1" in said and any(line.startswith("incomplete") for line in said)
    assert "BERT" not in tables.speed_table([found]) and "1 × 4 tokens" in tables.speed_table([found])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--record .*choose a file that you may write"):
        bench_records.write_record(found, tmp_path / "file" / "record.json")


@needs_kernels
@pytest.mark.usefixtures("peers_without_torch")
def test_a_runner_that_has_run_for_long_enough_is_not_run_again(folder, monkeypatch):
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)
    found = bench_records.run(Settings(path=str(folder), seq=(4,), threads=1, repeats=10, peers=()))
    assert len(found["rows"][0]["runners"][0]["seconds"]) == measure.MIN_RUNS


@needs_kernels
@pytest.mark.usefixtures("peers_without_torch")
@pytest.mark.parametrize("isa", ["scalar", None])
def test_a_row_has_the_ceilings_of_its_path_before_and_after(folder, isa):
    rows = []
    settings = Settings(path=str(folder), seq=(32,), threads=2, isa=isa, repeats=2, peers=())
    found = bench_records.run(settings, keep=lambda record: rows.extend(map(dict, record["rows"])))
    [row] = found["rows"]
    limits = row["ceilings"]
    assert rows[0]["ceilings"]["after"] is None and rows[0]["ceilings"]["before"] == limits["before"]
    states = [limits["before"], limits["after"]]
    assert all(0 < figure < 1e6 for state in states for of in state.values() for figure in of.values())
    peak = max(state["all_threads"]["tera_per_second"] for state in states)
    assert row["share_of_peak"] == pytest.approx(row["tera_per_second"] / peak) and 0 < row["share_of_peak"] < 3
    assert limits["l2_bytes"] < limits["memory_bytes"]
    given = bench_records.run(Settings(path=str(folder), seq=(4,), threads=1, repeats=1, peers=(), peak=2.0))["rows"][0]
    assert given["share_of_peak"] == pytest.approx(given["tera_per_second"] / 2)


@needs_kernels
@pytest.mark.usefixtures("peers_without_torch")
def test_wrong_results_are_not_timed(folder, monkeypatch):
    monkeypatch.setattr(measure.Bench, "_reference", lambda bench, job, root: np.ones((1, 8, 32), np.float32))
    with pytest.raises(
        CheckFailed, match=r"pruneofa: error \d\.\d+ against torch fp32, wanted at most 0\.15; it was not timed"
    ):
        bench_records.run(Settings(path=str(folder), seq=(8,), threads=1, peers=()))


def test_the_measuring_process_needs_no_torch():
    program = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import pruneofa.bench.records"
    subprocess.run([sys.executable, "-c", program], check=True)
