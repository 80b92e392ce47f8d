"""The benchmark: what it measures and says, and that every runner gives what torch gives."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pruneofa import families
from pruneofa.bench import measure, models, tables
from pruneofa.bench.break_even import SPARSITIES, pays_from
from pruneofa.bench.models import Case, Settings
from pruneofa.bench.peers import OURS, PEERS
from pruneofa.bench.random_folder import prune, write_random
from pruneofa.bench.workers import TimeLimitError, Worker, WorkerError
from pruneofa.engine import engine
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats.pattern import BLOCKS, pattern_holds
from tests.unit.engine_folder import POSITIONS, VOCABULARY, write_folder

needs_kernels = pytest.mark.skipif(engine.native is None, reason="the native kernels were not built")


def runner(name: str, milliseconds: float, **fields) -> dict:
    peer = PEERS.get(name, PEERS[OURS])
    known = {"name": name, "peer": peer.name, "kind": peer.kind, "dense": peer.dense, "error": 0.01, "verified": True}
    sizes = {"tolerance": 0.1, "peak": 3e6, "baseline": 1e6, "disk": 2e6, "load": 0.1, "first_answer": 0.2}
    return known | sizes | measure.statistics([milliseconds / 1e3] * 3) | fields


def record(*runners: dict, case: Case | None = None, **fields) -> dict:
    row = measure.summary(case or Case("1x128", (128,)), 10**9, list(runners), 14.0)
    model = {"name": OURS, "sparsity": 0.9, "patterns": ["unstructured"], "layers": 12, "hidden": 768}
    return {
        "format": measure.FORMAT, "isa": "amx", "capped": False, "rows": [row], "left_out": {}, "break_even": [],
        "models": [model | {"precision": "int8"}], "machine": {"load_average": [0, 0], "cpus": 2},
    } | fields  # fmt: skip


def test_the_median_of_ours_is_what_the_others_are_compared_with():
    row = record(runner(OURS, 2), runner("torch-int8", 8), runner("openvino-int8", 6), runner("deepsparse", 5))
    [row] = row["rows"]
    assert (row["fastest"], row["fastest_dense"], row["ratio"]) == ("deepsparse", "openvino-int8", pytest.approx(3))
    assert [r["ratio"] for r in row["runners"]] == pytest.approx([1, 4, 3, 2.5])
    assert row["tera_per_second"] == pytest.approx(0.5) and row["share_of_peak"] == pytest.approx(0.5 / 14)


def test_statistics_are_in_milliseconds():
    found = measure.statistics([k / 1e3 for k in range(1, 102)])
    assert (found["median_ms"], found["p10_ms"], found["p90_ms"]) == pytest.approx((51, 11, 91))
    assert len(found["seconds"]) == 101


def test_too_slow_a_row_fails_and_a_sparse_peer_has_to_be_beaten_only():
    fast = record(runner(OURS, 2), runner("torch-int8", 7), runner("deepsparse", 2.5))
    measure.check_ratio(fast, 3)
    with pytest.raises(CheckFailed, match=r"wanted 4 times .* 1x128: 3\.50 times as fast as torch-int8"):
        measure.check_ratio(fast, 4)
    with pytest.raises(CheckFailed, match="1x128: 0.50 times as fast as deepsparse"):
        measure.check_ratio(record(runner(OURS, 2), runner("torch-int8", 7), runner("deepsparse", 1)), 3)
    with pytest.raises(CheckFailed, match="1x128: no peer to compare with"):
        measure.check_ratio(record(runner(OURS, 2)), 3)


@pytest.mark.parametrize(
    ("kind", "error"), [("fp32", 0.25), ("int8", 0.5 / math.sqrt(8)), ("bf16", 0.5 / math.sqrt(8))]
)
def test_errors_are_relative_and_padding_does_not_count(kind, error):
    wanted = np.array([[[2, 0], [2, 0], [5, 5]]], np.float32)
    got = np.array([[[2, 0.5], [2, 0], [9, 9]]], np.float32)
    assert measure.error_of(got, wanted, kind, np.array([[True, True, False]])) == pytest.approx(error)
    assert measure.error_of(got[:, :2], wanted, kind) == math.inf


def test_inputs_are_the_same_every_time_and_padded_only_where_lengths_differ():
    case = Case("2x5", (5, 5))
    [ids] = case.inputs(100, 0).values()
    assert ids.shape == (2, 5) and ids.dtype == np.int64 and ids.min() >= 10 and ids.max() < 100
    assert (ids == case.inputs(100, 0)["input_ids"]).all()
    padded = Case("2x2-5", (2, 5)).inputs(100, 1)
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert padded["input_ids"][0, 2:].tolist() == [1, 1, 1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", "Model")


def cases(folder: Path, tmp_path: Path, **settings) -> list[Case]:
    settings = Settings(path=str(folder), **settings)
    return models.read_cases(settings, next(models.read_models(settings, tmp_path / "work")))


def test_cases_are_lengths_that_fit(folder, tmp_path):
    names = [case.name for case in cases(folder, tmp_path, batch=2)]
    assert names == ["2x32"]  # 128 and 384 are over the model's positions
    [mixed] = cases(folder, tmp_path / "2", mixed=("9x3-20",))
    assert len(mixed.lengths) == 9 and 3 <= min(mixed.lengths) < max(mixed.lengths) <= 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"seq": (POSITIONS + 1,)},
            rf"1x{POSITIONS + 1}: {POSITIONS + 1} tokens, but the model takes 1 to {POSITIONS}",
        ),
        ({"seq": (0,)}, "1x0: 0 tokens"),
        ({"batch": 0}, "batch is 0, wanted at least 1"),
        ({"mixed": ("32x9-8",)}, "--mixed 32x9-8: wanted COUNTxSHORTEST-LONGEST"),
        ({"mixed": ("some",)}, "--mixed some: wanted"),
    ],
)
def test_what_is_no_case(folder, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        cases(folder, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one model: PATH, or --random SHAPE"),
        ({"path": "x", "random": "bert-base"}, "give one model"),
        ({"random": "bert-bse"}, "random shape 'bert-bse': wanted one of bert-base, bert-large"),
        ({"random": "minilm", "pattern": "8x1"}, "pattern '8x1': wanted one of unstructured, 4x1, 1x4"),
        ({"random": "minilm", "sparsity": 90.0}, "sparsity is 90.0, wanted at least 0 and below 1"),
        ({"random": "minilm", "also": ("4x1",)}, "--also 4x1: wanted PATTERN@SPARSITY"),
    ],
)
def test_what_is_no_model(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        list(models.read_models(Settings(**settings), tmp_path))
    assert not any(tmp_path.iterdir())


def test_operations_are_those_of_linears_and_attention(folder, tmp_path):
    model = next(models.read_models(Settings(path=str(folder)), tmp_path / "work"))
    hidden, inner, layers = 32, 64, 2
    linears = 2 * layers * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 2 * layers * 2 * hidden
    assert model.operations(Case("", (5, 7))) == linears * 12 + attention * (25 + 49)


@pytest.mark.parametrize("pattern", BLOCKS)
def test_a_random_folder_has_the_zeros_asked_for_and_loads(tmp_path, monkeypatch, pattern):
    from pruneofa.formats import pattern as patterns

    tiny = families.Shape("tiny", "Tiny", layers=1, hidden=64, heads=4, inner=128)
    monkeypatch.setattr(families, "FAMILIES", (replace(families.FAMILIES[0], shapes=(tiny,)),))
    write_random(tmp_path, "tiny", 0.75, pattern)
    found = patterns.inspect(tmp_path)
    assert found["encoder"] == pytest.approx(0.75, abs=1e-3) and len(found["layers"]) == 6
    assert all(pattern_holds(w != 0, pattern) for _, w in patterns.read_weights(tmp_path, patterns.is_prunable))
    if engine.native is not None:
        assert engine.Engine.from_pretrained(tmp_path, threads=1).predict("w7 w8").shape == (64,)


def test_the_smallest_are_pruned():
    weight = np.array([[1, -5, 2, 6], [3, 0.1, -4, 7]], np.float32)
    assert prune(weight, 0.5, "unstructured").tolist() == [[0, -5, 0, 6], [0, 0, -4, 7]]
    assert prune(weight, 0.5, "1x4").tolist() in ([[0] * 4, weight[1].tolist()], [weight[0].tolist(), [0] * 4])
    assert (prune(weight, 0.0, "1x4") == weight).all()


def test_an_unknown_peer_is_named_with_the_nearest():
    with pytest.raises(InputError, match="peer 'openvno': there is none of this name; did you mean openvino"):
        measure.choose(Settings(peers=("openvno",)), None)
    with pytest.raises(InputError, match="peer 'deepspars'"):
        measure.choose(Settings(pythons={"deepspars": sys.executable}), None)


def test_what_is_not_installed_is_listed_or_refused(monkeypatch):
    monkeypatch.setattr(measure.Peer, "missing", lambda peer, elsewhere=False: ["gone"] if "onnx" in peer.name else [])
    chosen, left_out = measure.choose(Settings(), None)
    assert left_out["onnxruntime"].startswith("not installed (gone): pip install torch transformers onnx onnxruntime")
    assert OURS not in [peer.name for peer in chosen] and "torch-int8" in [peer.name for peer in chosen]
    with pytest.raises(InputError, match="peer onnxruntime: gone not installed; pip install "):
        measure.choose(Settings(peers=("onnxruntime",)), None)


@pytest.mark.parametrize(
    ("cap", "out"),
    [
        (None, set()),
        ("avx512vnni", {"onnxruntime", "onnxruntime-int8"}),
        ("avx2", {"onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"}),
        ("scalar", set(PEERS) - {OURS}),
    ],
)
def test_a_peer_that_cannot_be_held_to_an_isa_is_left_out_by_name(monkeypatch, cap, out):
    monkeypatch.setattr(measure.Peer, "missing", lambda peer, elsewhere=False: [])
    chosen, left_out = measure.choose(Settings(), cap)
    assert left_out == {name: f"cannot be held to {cap}" for name in out}
    assert {peer.name for peer in chosen} == set(PEERS) - {OURS} - out


@needs_kernels
@pytest.mark.skipif("amx" not in engine.Engine.available_isas(), reason="the best path here is itself a cap")
def test_processes_are_held_to_the_isa_and_to_nothing_else(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setattr(engine.Engine, "available_isas", staticmethod(lambda: ["scalar", "avx2", "amx"]))
    bench = measure.Bench(Settings(threads=3))
    assert "ONEDNN_MAX_CPU_ISA" not in bench.environment(PEERS["torch-int8"])
    assert bench.environment(PEERS["torch-int8"])["OMP_NUM_THREADS"] == "3"
    assert bench.environment(PEERS[OURS])["PATH"] == os.environ["PATH"]
    if "avx2" in engine.native.available_isas():
        capped = measure.Bench(Settings(isa="avx2")).environment(PEERS["torch-int8"])
        assert (capped["ONEDNN_MAX_CPU_ISA"], capped["ATEN_CPU_CAPABILITY"]) == ("AVX2", "avx2")


def test_a_process_that_dies_says_how(tmp_path):
    with Worker(OURS, tmp_path / "log", os.environ) as worker:
        with pytest.raises(WorkerError, match="KeyError: 'nobody'"):
            worker.ask("time", key="nobody", count=1)
        worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match="its process ended with -9"):
            worker.ask("memory")


def test_another_interpreter_needs_nothing_of_ours(tmp_path):
    with Worker("deepsparse", tmp_path / "log", os.environ, sys.executable) as worker:
        assert 1e6 < worker.ask("memory")["peak"] < 1e9


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    with Worker(OURS, tmp_path / "log", os.environ, limit=0.001) as worker:
        with pytest.raises(TimeLimitError, match=r"took longer than the 0\.001 seconds of --limit to memory"):
            worker.ask("memory")
        assert worker._process.wait(5) == -signal.SIGKILL
    with pytest.raises(InputError, match="limit is 0 seconds, wanted more than 0"):
        measure.Bench(Settings(limit=0))


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
@pytest.mark.parametrize("do", ["build", "time"])
def test_a_peer_over_its_limit_is_left_out_and_the_others_go_on(folder, monkeypatch, do):
    pytest.importorskip("torch", reason="the peers here are torch")
    stopping(monkeypatch, "torch-bf16", do, 2 if do == "time" else 1, TimeLimitError("took longer"))
    peers = ("torch-fp32", "torch-bf16")
    found = measure.run(Settings(path=str(folder), seq=(4, 8), threads=1, repeats=4, peers=peers))
    assert found["left_out"] == {"torch-bf16": "1x4: took longer"} and found["complete"]
    for row in found["rows"]:
        assert [(one["name"], len(one["seconds"])) for one in row["runners"]] == [(OURS, 4), ("torch-fp32", 4)]


@needs_kernels
def test_ours_over_its_limit_is_an_error(folder, monkeypatch):
    stopping(monkeypatch, OURS, "build", 1, TimeLimitError("took longer"))
    with pytest.raises(InputError, match="1x8: pruneofa took longer"):
        measure.run(Settings(path=str(folder), seq=(8,), threads=1, repeats=1, peers=()))


@needs_kernels
def test_what_was_measured_is_the_callers_whatever_ends_the_rest(folder, tmp_path, monkeypatch):
    stopping(monkeypatch, OURS, "time", 5, KeyboardInterrupt())
    file, kept = tmp_path / "out" / "record.json", []

    def keep(record):
        measure.write_record(record, file)
        kept.append(len(record["rows"]))

    with pytest.raises(KeyboardInterrupt):
        measure.run(Settings(path=str(folder), seq=(4, 8), threads=1, repeats=3, peers=()), keep=keep)
    [found] = tables.read_records([file])
    assert [(row["case"], len(row["runners"][0]["seconds"])) for row in found["rows"]] == [("1x4", 3), ("1x8", 1)]
    assert kept == [0, 1, 1, 1, 2]
    said = tables.remarks(found)
    assert "fewer than 3 runs: pruneofa 1" in said and any(line.startswith("not complete") for line in said)
    assert "BERT" not in tables.speed_table([found]) and "1 × 4 tokens" in tables.speed_table([found])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--record .*name a file that you may write"):
        measure.write_record(found, tmp_path / "file" / "record.json")


@needs_kernels
def test_a_runner_that_has_run_for_long_enough_is_not_run_again(folder, monkeypatch):
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    found = measure.run(Settings(path=str(folder), seq=(4,), threads=1, repeats=10, peers=()))
    assert len(found["rows"][0]["runners"][0]["seconds"]) == measure.FEWEST


def test_long_runs_need_no_run_before_them(monkeypatch):
    from pruneofa.bench import peers

    ran, process = [], peers._Process()
    process.runs["x"] = lambda: ran.append(1)
    monkeypatch.setattr(peers, "LONG", -1.0)
    for runs in (3, 5):  # one that does not count, then never again
        process.time("x", 2)
        assert len(ran) == runs


@needs_kernels
def test_a_run_verifies_times_and_describes(folder, tmp_path):
    pytest.importorskip("torch", reason="outputs are verified against torch, which is not installed")
    dies = {} if PEERS["deepsparse"].missing(elsewhere=True) else {"deepsparse": "/bin/false"}
    peers = ("torch-fp32", *dies)
    also = (str(write_folder(tmp_path / "other", "Model")),)
    settings = Settings(path=str(folder), also=also, seq=(8,), threads=1, repeats=2, peers=peers, pythons=dies)
    found = measure.run(settings)
    json.dumps(found)
    [row] = found["rows"]
    assert (row["case"], row["tokens"], row["fastest_dense"]) == ("1x8", 8, "torch-fp32")
    ours, other, torch = row["runners"]
    assert [one["name"] for one in row["runners"]] == [OURS, f"{OURS} 2: other", "torch-fp32"]
    assert other["verified"] and ours["verified"] and 0 < ours["error"] < 0.15 and torch["error"] == 0
    for one in (ours, other, torch):
        assert len(one["seconds"]) == 2 and 0 < one["p10_ms"] <= one["median_ms"] <= one["p90_ms"]
        assert one["peak"] >= one["baseline"] > 1e6 and one["first_answer"] >= one["load"] > 0 and one["disk"] > 1e3
    assert found["models"][0]["layers"] == 2 and found["machine"]["cpus"] >= 1 and found["versions"]["numpy"]
    if dies:  # what exports the model for it is installed
        assert "1x8: its process ended with 1" in found["left_out"]["deepsparse"]


@needs_kernels
def test_wrong_results_are_not_timed(folder, monkeypatch):
    pytest.importorskip("torch", reason="outputs are verified against torch, which is not installed")
    monkeypatch.setitem(measure.TOLERANCES, "int8", 1e-9)
    with pytest.raises(CheckFailed, match=r"pruneofa: error .* against torch fp32 is above 1e-09; not timed"):
        measure.run(Settings(path=str(folder), seq=(8,), threads=1, peers=()))


@needs_kernels
@pytest.mark.parametrize("name", [name for name in PEERS if name not in (OURS, "torch-fp32")])
def test_every_peer_gives_what_torch_gives(folder, name):
    if missing := PEERS[name].missing():
        pytest.skip(f"{name} needs {', '.join(missing)}, not installed")
    found = measure.run(Settings(path=str(folder), mixed=("3x4-9",), threads=1, repeats=1, peers=(name,)))
    assert found["left_out"] == {}
    assert [one["verified"] for one in found["rows"][0]["runners"]] == [True, True]


def test_where_it_pays():
    ours = {f"{s:g}": 100 * (1 - s) for s in SPARSITIES}
    assert pays_from(ours, 25.0) == 0.8
    assert pays_from(ours, 1.0) is None and pays_from(ours, 1000.0) == 0 and pays_from(ours, None) is None
    assert pays_from(ours | {"0.95": 30.0}, 25.0) is None  # what pays at 0.9 alone does not pay from there


@needs_kernels
def test_break_even_measures_every_shape(folder, tmp_path):
    from pruneofa.bench.break_even import break_even

    settings = Settings(path=str(folder), threads=1, repeats=1, peers=())
    rows = list(break_even(measure.Bench(settings), next(models.read_models(settings, tmp_path)), [4]))
    assert [row["shape"] for row in rows] == [[32, 32], [32, 64], [64, 32]]
    assert all(len(row["ours_us"]) == len(SPARSITIES) and min(row["ours_us"].values()) > 0 for row in rows)
    if not PEERS["torch-int8"].missing():
        assert all(row["dense_us"] > 0 for row in rows)
    assert tables.break_even_rows(rows)[0]["layer"] == "32x32"


def test_break_even_asks_a_peer_that_was_too_slow_with_whole_models(folder, tmp_path, monkeypatch):
    from pruneofa.bench import break_even

    bench = measure.Bench(Settings(path=str(folder), threads=1, repeats=1, peers=()))
    bench.left_out[break_even.DENSE] = "1x4: took longer"
    monkeypatch.setattr(break_even, "SPARSITIES", (0.9,))
    rows = list(break_even.break_even(bench, next(models.read_models(bench.settings, tmp_path)), [4]))
    assert rows
    if not PEERS[break_even.DENSE].missing():
        assert all(row["dense_us"] > 0 for row in rows)


def test_break_even_goes_on_without_a_dense_peer_that_fails(folder, tmp_path, monkeypatch):
    from pruneofa.bench import break_even

    ask = Worker.ask

    def fail(self, command, **options):
        if self.peer == break_even.DENSE:
            raise WorkerError("no such engine")
        return ask(self, command, **options)

    monkeypatch.setattr(Worker, "ask", fail)
    monkeypatch.setattr(type(PEERS[break_even.DENSE]), "missing", lambda self: None)
    bench = measure.Bench(Settings(path=str(folder), threads=1, repeats=1, peers=()))
    model = next(models.read_models(bench.settings, tmp_path))
    rows = list(break_even.break_even(bench, model, [4]))
    assert len(rows) == 3 and all(row["dense_us"] is None for row in rows)
    assert bench.left_out == {break_even.LEFT_OUT: "break-even: no such engine"}


def break_even_row(pays: float | None, dense: float | None = 25.0) -> dict:
    ours = {f"{s:g}": 100 * (1 - s) for s in SPARSITIES}
    return {"shape": [8, 8], "tokens": 4, "ours_us": ours, "dense_us": dense, "dense": "torch-int8", "pays_from": pays}


def test_it_is_said_plainly_where_it_pays_and_where_not():
    say = tables.break_even_remark
    assert say([break_even_row(0.8), break_even_row(0.7)]).endswith("faster than dense int8 from sparsity 0.8")
    assert "no sparsity up to 0.95 is faster" in say([break_even_row(None)])
    assert "pays for 1 of 2 layers, there from 0.7" in say([break_even_row(0.7), break_even_row(None)])
    assert "nothing dense to compare with" in say([break_even_row(None, None)])
    rows = tables.break_even_rows([break_even_row(None), break_even_row(None, None), break_even_row(0.8)])
    assert [row["pays from"] for row in rows] == ["none of these", "unknown: no dense peer", "0.8"]


def test_a_peer_that_is_off_is_marked_and_said():
    off = runner("openvino-int8", 6, verified=False, error=0.4)
    found = record(runner(OURS, 2), off, left_out={"openvino": "cannot be held to avx2"})
    assert "openvino-int8 (!)" in tables.aligned(tables.case_rows(found["rows"][0]))
    said = "\n".join(tables.remarks(found))
    assert "(!) openvino-int8: its output is off by 0.4, tolerance 0.1; timed all the same" in said
    assert "left out: openvino: cannot be held to avx2" in said and "3.00 times as fast as openvino-int8" in said


def test_a_busy_machine_and_missing_torch_are_said():
    found = record(runner(OURS, 2, verified=None, error=None), machine={"load_average": [1.5, 1], "cpus": 2})
    said = "\n".join(tables.remarks(found))
    assert "outputs were not verified" in said and "measure again when idle" in said and "no peer" in said


def test_columns_are_aligned_and_never_folded():
    text = tables.aligned([{"a": "x" * 100, "b": 1}, {"a": "y", "b": 22}])
    assert [len(line) for line in text.splitlines()] == [104, 104, 104, 0]
    assert tables.aligned([]) == ""


def test_the_table_of_the_readme_comes_from_records(tmp_path):
    mixed = Case("32x8-128", (8, 128))
    found = [
        record(runner(OURS, 2), runner("openvino-int8", 7), runner("deepsparse", 9)),
        record(runner(OURS, 40), runner("onnxruntime-int8", 130), case=mixed, isa="avx2", capped=True),
    ]
    for index, one in enumerate(found):
        (tmp_path / f"{index}.json").write_text(json.dumps(one))
    text = tables.speed_table(tables.read_records(sorted(tmp_path.iterdir())))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[2] == ["BERT-Base, 90 %, int8", "amx", "1 × 128 tokens", "2 ms", "openvino-int8, 7 ms", "**3.50×**",
                        "4.50×", "4 %"]  # fmt: skip
    assert lines[3][1:6] == ["avx2 (capped)", "2 × 8–128 tokens", "50 seq/s", "onnxruntime-int8, 15.4 seq/s",
                             "**3.25×**"]  # fmt: skip
    (tmp_path / "0.json").write_text("{}")
    with pytest.raises(InputError, match="wanted a file that pruneofa bench --json wrote"):
        tables.read_records([tmp_path / "0.json"])


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_a_picture(tmp_path, suffix):
    pytest.importorskip("altair", reason="altair draws it, and is not installed")
    tables.picture(record(runner(OURS, 2), runner("torch-int8", 8)), tmp_path / f"p{suffix}")
    assert "torch-int8" in (tmp_path / f"p{suffix}").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"wanted a name that ends in \.svg or \.html"):
        tables.check_picture(tmp_path / "p.gif")


def test_the_measuring_process_needs_no_torch():
    program = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import pruneofa.bench.measure"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_random_ids_are_in_the_vocabulary():
    ids = Case("4x50", (50,) * 4).inputs(len(VOCABULARY), 0)["input_ids"]
    assert ids.min() >= 5 and ids.max() < len(VOCABULARY)
