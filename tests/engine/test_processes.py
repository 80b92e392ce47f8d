"""An engine across processes: forks, pickles, interruptions, and ends of the interpreter."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pruneofa import Engine
from pruneofa.engine import engine as engine_module
from tests.tiny import write_folder

ROOT = Path(__file__).parents[2]
START = """
import os, signal, sys, threading, time
from pruneofa import Engine
from pruneofa.engine import engine as engine_module
engine_module.meeting_cost = lambda *_: 0.0  # for so small a model no second thread would pay
engine_module.usable_threads = lambda quota: 2
engine = Engine.from_pretrained(sys.argv[1], threads=2)
assert engine.plan([6]).width == 2
texts = ["the great film", "a bad king was here"] * 16 + ["the king"]  # a batch for two lanes, and one text
wanted = engine.predict(texts)
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def run(program, folder, timeout=60):
    command = [sys.executable, "-W", "ignore", "-c", START + program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


CHILD = """
def child(use):
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            code = 0 if not use or engine.predict(texts) == wanted else 4
        finally:
            sys.exit(code)  # by the interpreter's own end, which destroys the engine
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@needs_fork
@pytest.mark.parametrize("use", [True, False])
def test_a_forked_child_works_and_exits(folder, use):
    done = run(CHILD + f"print([child({use}) for _ in range(3)], engine.predict(texts) == wanted)", folder)
    assert (done.returncode, done.stdout) == (0, "[0, 0, 0] True\n"), done.stderr


@needs_fork
@pytest.mark.parametrize("use", [True, False])
def test_a_fork_while_other_threads_predict(folder, use):
    program = f"""
def busy():
    while not stop.is_set():
        assert engine.predict(texts) == wanted
stop = threading.Event()
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads:
    thread.start()
codes = [child({use}) for _ in range(15)]
stop.set()
for thread in threads:
    thread.join()
print(codes, engine.predict(texts) == wanted)
"""
    done = run(CHILD + program, folder)
    assert (done.returncode, done.stdout) == (0, f"{[0] * 15} True\n"), done.stderr


@needs_fork
def test_a_grandchild_works(folder):
    program = """
pid = os.fork()
if pid == 0:
    first = engine.predict(texts) == wanted
    inner = os.fork()
    if inner == 0:
        sys.exit(0 if engine.predict(texts) == wanted else 4)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) if first else 5)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(program, folder).stdout == "0\n"


LOADED: list[Engine] = []


def _use_both_threads():
    """As START does."""
    engine_module.meeting_cost = lambda *_: 0.0
    engine_module.usable_threads = lambda quota: 2


@pytest.fixture
def both_threads(monkeypatch):
    for name in ("meeting_cost", "usable_threads"):  # which are put back at the end
        monkeypatch.setattr(engine_module, name, getattr(engine_module, name))
    _use_both_threads()


def _predict(texts):
    return LOADED[0].predict(texts)


def _predict_with(engine, texts):
    assert engine.plan([6]).width == 2
    return engine.predict(texts)


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pre_forking_server(folder, both_threads):
    """Workers that are forked after the engine was loaded and used, as gunicorn's with --preload."""
    LOADED[:] = [Engine.from_pretrained(folder, threads=2)]
    assert LOADED[0].plan([6]).width == 2
    wanted = LOADED[0].predict(["the great film", "bad"])
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_predict, [["the great film", "bad"]] * 12, chunksize=1) == [wanted] * 12
    LOADED.clear()


def test_an_engine_is_sent_to_a_process_that_was_spawned(folder):
    engine = Engine.from_pretrained(folder, precision="fp32", threads=2, lanes=1)
    wanted = engine.predict(["the great film", "bad"])
    with multiprocessing.get_context("spawn").Pool(1, _use_both_threads) as pool:
        assert pool.apply(_predict_with, (engine, ["the great film", "bad"])) == wanted


def test_a_pickle_is_the_path_and_the_settings(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    engine = Engine.from_pretrained(folder.name, precision="fp32", threads=2, lanes=1, isa="scalar")
    data = pickle.dumps(engine)
    assert len(data) < 1000 and str(folder).encode() in data
    monkeypatch.chdir("/")
    same = pickle.loads(data)
    for name in ("precision", "threads", "threads_reason", "lanes", "isa"):
        assert getattr(same, name) == getattr(engine, name)
    assert same.predict("the great film") == engine.predict("the great film")
    monkeypatch.setenv("PRUNEOFA_THREADS", "3")
    chosen = pickle.dumps(Engine.from_pretrained(folder))
    monkeypatch.setenv("PRUNEOFA_ISA", "scalar")
    there = pickle.loads(chosen)
    assert (there.threads, there.isa) == (3, "scalar")  # what was not asked for is chosen anew where it arrives


@pytest.mark.parametrize("sleep", [0, 0.001, 0.01, 0.1])
def test_a_main_thread_that_ends_while_daemon_threads_predict(folder, sleep):
    program = f"""
def busy():
    while True:
        engine.predict(texts)
for _ in range(4):
    threading.Thread(target=busy, daemon=True).start()
time.sleep({sleep})
print("end")
"""
    for _ in range(3):
        done = run(program, folder)
        assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_main_thread_that_ends_while_a_daemon_thread_loads(folder):
    program = """
def load():
    while True:
        Engine.from_pretrained(sys.argv[1], threads=2)
threading.Thread(target=load, daemon=True).start()
time.sleep(0.2)
"""
    done = run(program, folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_engines_that_are_alive_at_the_end(folder):
    program = """
import atexit
engine.itself = engine  # a circle, which only the collector of the end finds
sys.kept = engine
atexit.register(lambda: print(engine.predict(texts) == wanted))
"""
    done = run(program, folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_an_interruption_ends_a_long_prediction_soon(folder):
    program = """
print("ready", flush=True)
try:
    engine.predict(texts * 10000, batch_size=400000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(engine.predict(texts) == wanted)
"""
    command = [sys.executable, "-c", START + program, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            begin = time.monotonic()
            assert process.stdout.readline() == "interrupted\n"
            seconds = time.monotonic() - begin
            assert process.stdout.readline() == "True\n"
        finally:
            if sys.exc_info()[0] is not None:
                process.kill()
    assert process.returncode == 0 and seconds < 5  # on an idle machine below 1
