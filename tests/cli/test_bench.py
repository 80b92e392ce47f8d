"""`pruneofa bench` and `pruneofa inspect --engine`."""

import json
import sys

import pytest

from pruneofa.bench.workers import Worker
from pruneofa.engine import engine
from pruneofa.engine.threads import choose_threads
from tests.tiny import write_folder

pytestmark = pytest.mark.skipif(engine.native is None, reason="the native kernels were not built")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "openvno"], "did you mean openvino"),
        (["--random", "bert-base"], "wanted exactly one model; give PATH, or --random SHAPE"),
        (["--seq", "9999"], "1x9999: 9999 tokens, but the model takes 1 to 64"),
        (["--mixed", "4"], "--mixed 4: wanted COUNTxSHORTEST-LONGEST"),
        (["--isa", "sse"], "isa is 'sse', which this CPU does not run"),
        (["--threads", "0"], "threads is 0, wanted an integer from 1"),
        (["--repeats", "0"], "repeats is 0, wanted at least 1"),
        (["--limit", "0"], "limit is 0 seconds, wanted more than 0"),
        (["--record", "/dev/null/x"], "--record /dev/null/x: File exists; choose a file that you may write"),
        (["--picture", "speed.gif"], "wanted a name that ends in .svg or .html"),
        (["--python", "deepsparse"], "wanted PEER=FILE"),
        (["--python", f"deepspars={sys.executable}"], "did you mean deepsparse"),
    ],
)
def test_wrong_input_is_one_line(refused, folder, arguments, message):
    assert message in refused("bench", folder, *arguments)


def test_no_model(refused, tmp_path):
    assert "wanted exactly one model" in refused("bench", "--peers")
    assert "no such folder" in refused("bench", tmp_path / "none", "--peers")


@pytest.mark.usefixtures("peers_without_torch")
def test_alone_it_prints_a_table_or_a_record(call, folder):
    said = call("bench", folder, "--peers", "--seq", 8, "--threads", 1, "--repeats", 2, "--at-least", 3)
    assert said.code == 1 and "failed: wanted 3 times as fast" in said.err and "1x8: no peer" in said.err
    first, second, *_ = said.out.splitlines()
    assert first.split()[:3] == ["1x8", "median", "ms"] and second.startswith("pruneofa ")
    assert "no peer to compare with" in said.out
    assert "% of the machine's peak" in said.out and "1x8: before and after, 1 thread reached: arithmetic " in said.out
    said = call("bench", folder, "--peers", "none", "--mixed", "3x2-9", "--threads", 1, "--repeats", 1, "--json")
    assert said.code == 0
    [row] = json.loads(said.out)["rows"]
    assert row["case"] == "3x2-9" and set(row["ceilings"]) == {"l2_bytes", "memory_bytes", "before", "after"}
    assert row["ceilings"]["after"]["all_threads"].keys() == row["ceilings"]["before"]["one_thread"].keys()


@pytest.mark.usefixtures("peers_without_torch")
def test_an_interrupt_prints_what_was_measured(call, folder, tmp_path, monkeypatch):
    ask, asked = Worker.ask, []

    def interrupted(worker, do, **arguments):
        asked.append(do)
        if asked.count("time") == 4:
            raise KeyboardInterrupt
        return ask(worker, do, **arguments)

    monkeypatch.setattr(Worker, "ask", interrupted)
    given = ["bench", folder, "--peers", "--seq", 4, 8, "--threads", 1, "--repeats", 3, "--record"]
    said = call(*given, tmp_path / "r.json")
    assert said.code == 130 and "pruneofa: interrupted; the measurements so far are above\n" in said.err
    assert said.out.startswith("1x4 ") and "1x8" not in said.out and "incomplete: " in said.out
    assert [row["case"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["1x4"]
    asked[:] = ["time"] * 3
    said = call(*given, tmp_path / "s.json")
    assert said.code == 130 and said.out == "" and "nothing was measured yet" in said.err


def test_inspect_says_what_the_engine_chose_and_why(call, folder, monkeypatch):
    said = call("inspect", folder, "--engine", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)["engine"]
    assert found["isa"] == engine.Engine.available_isas()[-1]
    assert len(found["layers"]) == 12 and all(" % zeros" in why for why in found["layers"].values())
    assert found["threads"] == choose_threads(None).count and found["threads_reason"] == choose_threads(None).reason
    text = call("inspect", folder, "--engine").out
    assert found["threads_reason"] in text
    assert found["lanes"]["1 text of 128 tokens"].startswith("1 x ")
    assert "32 texts of 64 tokens" in text and found["barriers"] == 1 + 2 * 10
    monkeypatch.setenv("PRUNEOFA_THREADS", "64")
    monkeypatch.setattr(engine, "usable_threads", lambda quota: 64)
    more = call("inspect", folder, "--engine").out
    assert " more would lose at 21 barriers what they gain" in more
    assert "layer.1.intermediate" in text and f"on {found['isa']}" in text
    assert "engine" not in json.loads(call("inspect", folder, "--json").out)
