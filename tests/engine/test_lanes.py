"""How a batch is divided among threads: every sequence once, evenly, and with the same results however."""

import statistics
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruneofa import Engine
from pruneofa.bench.random_folder import write_random
from pruneofa.engine import engine as engine_module
from pruneofa.engine.lanes import _cost, groups, meeting_cost, plan
from pruneofa.engine.threads import allowed_cpus
from pruneofa.errors import InputError
from tests.tiny import write_folder

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 16), st.none() | st.integers(1, 16))
def test_every_sequence_is_in_one_part(lengths, threads, lanes):
    made = plan(lengths, threads, lanes)
    assert sorted(index for part in made.parts for index in part) == list(range(len(lengths)))
    assert all(made.parts)
    assert made.lanes >= 1 and made.width >= 1 and made.lanes * made.width <= threads
    assert made.lanes <= len(made.parts)
    if lanes is not None:
        assert made.lanes == min(lanes, threads, len(lengths))


@given(LENGTHS, st.integers(1, 16))
def test_parts_are_even_and_fit_the_caches(lengths, threads):
    made = plan(lengths, threads)
    tokens = [sum(lengths[index] for index in part) for part in made.parts]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert max(tokens) <= 384 + max(lengths)
    assert tokens == sorted(tokens, reverse=True)  # the last parts to begin are the shortest


def test_one_text_has_one_lane_and_no_more_threads_than_pay():
    assert [(plan([128], threads).lanes, plan([128], threads).width) for threads in (1, 2, 4, 8)] == [
        (1, 1), (1, 2), (1, 4), (1, 8)
    ]  # fmt: skip
    assert plan([16], 64).width < plan([128], 64).width < 16


BERT, MINILM = (121, 84_934_656), (61, 10_616_832)


def test_a_small_model_on_a_fast_path_is_worth_fewer_threads():
    widths = {
        (isa, size): plan([128], 64, meeting=meeting_cost(*size, isa, "int8")).width
        for isa in ("amx", "avx512bf16", "avx512vnni", "avx2")
        for size in (BERT, MINILM)
    }
    assert widths["amx", BERT] == plan([128], 64).width >= 8
    assert all(2 <= widths[isa, MINILM] <= widths[isa, BERT] for isa in ("amx", "avx512vnni", "avx2"))
    for size in (BERT, MINILM):
        assert (
            widths["amx", size] <= widths["avx512bf16", size] <= widths["avx512vnni", size] <= widths["avx2", size] < 64
        )
    assert meeting_cost(73, BERT[1], "amx", "int8") < meeting_cost(*BERT, "amx", "int8")
    for isa in ("amx", "avx512vnni", "avx2"):  # floats use no tiles
        assert meeting_cost(*BERT, isa, "fp32") == meeting_cost(*BERT, "avx2", "int8")


@given(st.integers(1, 512), st.integers(1, 64), st.floats(0, 10))
def test_a_further_thread_costs_a_text_nothing(tokens, threads, meeting):
    """As far as the model of costs knows: those that do not pay are left idle."""
    made, more = (plan([tokens], count, meeting=meeting) for count in (threads, threads + 1))
    assert _cost(more, [tokens], meeting) <= _cost(made, [tokens], meeting)
    assert made.width + made.spare == threads and made.lanes == 1


def test_many_texts_have_a_lane_for_every_thread():
    for threads in (2, 4, 16):
        made = plan([128] * 64, threads)
        assert (made.lanes, made.width) == (threads, 1) and len(made.parts) % threads == 0


def test_the_argument_wins():
    assert (plan([128] * 64, 8, 2).lanes, plan([128] * 64, 8, 2).width) == (2, 4)
    assert plan([128], 8, 4).lanes == 1  # there is one text only


@given(st.lists(st.integers(1, 20000), min_size=1, max_size=40))
def test_groups_are_in_order_and_bounded(lengths):
    made = list(groups(lengths))
    assert [index for group in made for index in group] == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[index] for index in group) <= 16384 for group in made)


@pytest.mark.parametrize("lanes", [0, -1, 3, True, 1.0, "2"])
def test_wrong_lanes_are_refused(tmp_path, lanes):
    with pytest.raises(InputError, match="lanes is .*, wanted an integer from 1 to 2, the threads, or None to choose"):
        Engine.from_pretrained(write_folder(tmp_path), threads=2, lanes=lanes)


@pytest.fixture
def all_threads(monkeypatch):
    """Every thread works, also those that have no CPU of this machine, or do not pay for so small a model."""
    monkeypatch.setattr(engine_module, "usable_threads", lambda quota: 64)
    monkeypatch.setattr(engine_module, "meeting_cost", lambda *_: 0.0)


TEXTS = [" ".join(["the great king was bad"] * (1 + number % 12)) for number in range(40)]


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_results_are_the_same_whatever_the_lanes(tmp_path, precision, all_threads):
    folder = write_folder(tmp_path)
    wanted = Engine.from_pretrained(folder, precision=precision, threads=1).predict(TEXTS)
    for threads, lanes, width in ((2, None, 1), (2, 1, 2), (5, 2, 2), (6, 6, 1)):
        found = Engine.from_pretrained(folder, precision=precision, threads=threads, lanes=lanes)
        assert found.plan([9] * 40).width == width
        assert found.predict(TEXTS, batch_size=40) == wanted
        assert found.predict(TEXTS, batch_size=7) == wanted


@pytest.mark.parametrize("lanes", [None, 1])
def test_python_threads_share_the_lanes(tmp_path, all_threads, lanes):
    engine = Engine.from_pretrained(write_folder(tmp_path), threads=3, lanes=lanes)
    assert engine.plan([9]).width == 3
    wanted = [engine.predict(TEXTS[number:]) for number in range(8)]
    results = {}

    def work(number):
        results[number] = [engine.predict(TEXTS[number:]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found == wanted[number] for number in range(8) for found in results[number])


def test_no_more_threads_work_than_can_run(tmp_path, monkeypatch):
    engine = Engine.from_pretrained(write_folder(tmp_path), threads=16)
    monkeypatch.setattr(engine_module, "usable_threads", lambda quota: 2)
    made = engine.plan([128] * 64)
    assert made.lanes * made.width == 2 and engine.threads == 16


def test_a_kernel_that_returns_early_is_called_again(tmp_path, monkeypatch):
    engine = Engine.from_pretrained(write_folder(tmp_path), threads=2)
    wanted = engine.predict(TEXTS)
    native, calls = engine._encoder, []

    class Hasty:
        def forward(self, ids, positions, types, offsets, *, parts, lanes, width):
            """Computes the first part only."""
            calls.append(len(parts) - 1)
            last = parts[1]
            end = offsets[last]
            return native.forward(ids[:end], positions[:end], types[:end], offsets[: last + 1].copy())

    monkeypatch.setattr(engine, "_encoder", Hasty())
    assert engine.predict(TEXTS) == wanted
    assert calls[0] > 1 and calls[-1] == 1


def test_a_long_batch_returns_before_it_is_done(tmp_path):
    """So that Ctrl-C is seen: see test_processes.py."""
    native = Engine.from_pretrained(write_folder(tmp_path), threads=1)._encoder
    count = 20000
    ids = np.full(count * 60, 5, np.int32)
    positions = np.tile(np.arange(60, dtype=np.int32), count)
    hidden = native.forward(
        ids, positions, np.zeros_like(ids), np.arange(count + 1, dtype=np.int32) * 60,
        parts=np.arange(count + 1, dtype=np.int32),
    )  # fmt: skip
    assert 0 < len(hidden) < len(ids) and len(hidden) % 60 == 0


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="NOT TESTED: two threads after a pause; this process has one CPU")
def test_after_a_pause_two_threads_are_no_slower_than_one(tmp_path):
    """A thread that woke late made the others sleep at each barrier: a pass took twice as long as with one thread."""
    write_random(tmp_path, "minilm", 0.9)
    engines = [Engine.from_pretrained(tmp_path, threads=threads) for threads in (1, 2)]
    ids = np.arange(1000, 1128)[None]
    for engine in engines:
        engine.encode(ids)
    ratios = []
    for _ in range(5):  # others may want the CPUs for a while
        times = [[], []]
        for _ in range(9):
            for engine, found in zip(engines, times, strict=True):
                time.sleep(0.05)
                begin = time.perf_counter()
                engine.encode(ids)
                found.append(time.perf_counter() - begin)
        ratios.append(statistics.median(times[1]) / statistics.median(times[0]))
        if ratios[-1] < 1.4:
            return
    raise AssertionError(f"two threads took {ratios} times as long as one")
