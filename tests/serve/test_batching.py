"""The queue: whose turn it is, what is refused, what is dropped, and that every input gets its own result."""

import asyncio
import threading
from collections import deque

import numpy as np
import pytest

from pruneofa.engine.tokenizer import Tokens
from pruneofa.errors import InputError
from pruneofa.serve.batching import SLICE, Batcher, Job, next_batch
from pruneofa.serve.refusal import Refused


class FakeModel:
    """Inputs are lists of one number; a sequence has as many tokens, and its result is their sum."""

    name = "sums"

    def __init__(self, windows=0):
        self.windows = windows  # of each input, as they are estimated
        self.batches = []
        self.go = threading.Event()
        self.go.set()

    def windows_of(self, items):
        return self.windows * len(items)

    def tokenize(self, items, names, *, truncate, side, prompt):
        if any(item == [0] for item in items):
            raise Refused("Empty", "empty")
        return [Tokens(np.ones(item[0], np.int32), np.zeros(item[0], np.int32), text=i) for i, item in enumerate(items)]

    def compute(self, sequences, whole):
        self.go.wait()
        self.batches.append([len(sequence.ids) for sequence in sequences])
        if any(len(sequence.ids) == 13 for sequence in sequences):
            raise RuntimeError("the engine is broken")
        if any(len(sequence.ids) == 17 for sequence in sequences):
            raise InputError("the batch: its result is infinite")
        return [np.float32([sequence.ids.sum()]) for sequence in sequences]


def job(lengths, model=None):
    return Job(model or FakeModel(), [[length] for length in lengths], [f"inputs[{i}]" for i in range(len(lengths))])


def waiting(*jobs):
    for one in jobs:
        while not one.tokenized:
            one.add_slice(one.tokenize_slice())
    return deque(jobs)


def taken(batch, *jobs):
    return [(jobs.index(one), len(one.sequences[index].ids)) for one, index in batch]


def test_jobs_are_served_in_order_and_their_short_sequences_first():
    model = FakeModel()
    many, one = job([3, 9, 5, 4], model), job([2], model)
    queue = waiting(many, one)
    assert taken(next_batch(queue, 12), many, one) == [(0, 3), (0, 4), (0, 5)]
    assert taken(next_batch(queue, 12), many, one) == [(0, 9), (1, 2)]
    assert next_batch(queue, 12) == [] and not queue


def test_a_sequence_longer_than_a_batch_is_computed_alone():
    long = job([50, 1])
    queue = waiting(long)
    assert taken(next_batch(queue, 10), long) == [(0, 1)]
    assert taken(next_batch(queue, 10), long) == [(0, 50)]


def test_a_batch_has_one_model_and_others_get_their_turn():
    first, second = job([2, 2]), job([3])
    third = job([4], first.model)
    queue = waiting(first, second, third)
    assert taken(next_batch(queue, 20), first, second, third) == [(0, 2), (0, 2), (2, 4)]
    assert taken(next_batch(queue, 20), first, second, third) == [(1, 3)]


def test_windows_of_one_input_take_turns_with_other_requests():
    model = FakeModel()
    text, short = job([1], model), job([2], model)
    text.add_slice([Tokens(np.ones(1, np.int32), np.zeros(1, np.int32))] * 10 * SLICE)
    queue = deque([text, *waiting(short)])
    found = taken(next_batch(queue, SLICE + 2), text, short)
    assert found == [(0, 1)] * SLICE + [(1, 2)]
    rest = [taken(next_batch(queue, SLICE + 2), text, short) for _ in range(9)]
    assert rest == [[(0, 1)] * SLICE] * 9 and not queue


def test_windows_keep_the_number_of_their_input_over_slices():
    many = job([1] * (SLICE + 3))
    waiting(many)
    assert [sequence.text for sequence in many.sequences] == list(range(SLICE + 3))


def test_a_slice_is_fewer_inputs_where_they_are_read_in_many_windows():
    for windows, inputs in ((1, SLICE), (10, 3), (16, 2), (100, 1)):
        assert len(job([1] * 40, FakeModel(windows)).tokenize_slice()) == inputs


def test_windows_of_all_inputs_of_a_request_are_bounded(monkeypatch):
    monkeypatch.setattr("pruneofa.serve.batching.MAX_WINDOWS", 5)
    waiting(job([1] * 6))  # each in one
    many = job([1, 1])
    monkeypatch.setattr(many.model, "tokenize", lambda items, *_, **__: [Tokens(np.ones(1), np.zeros(1))] * 3)
    monkeypatch.setattr(many.model, "windows", SLICE)
    many.add_slice(many.tokenize_slice())
    with pytest.raises(Refused, match=r"inputs\[0\] to inputs\[1\] take 6 windows together, wanted at most 5"):
        many.tokenize_slice()


@pytest.fixture
def batcher():
    made = Batcher(max_batch_tokens=64, max_concurrent_requests=100)
    yield made
    made.close()


def results(one):
    return [int(one.results[index][0]) for index in range(len(one.results))]


def test_every_input_gets_its_own_result(batcher):
    model = FakeModel()
    jobs = [job([1 + (7 * i + k) % 12 for k in range(1 + i % 5)], model) for i in range(30)]

    async def all_of_them():
        await asyncio.gather(*map(batcher.run, jobs))

    asyncio.run(all_of_them())
    for one in jobs:
        assert results(one) == [item[0] for item in one.items]
        assert one.tokenization > 0 and one.inference > 0
    assert batcher.waiting == 0


def test_what_waits_is_told_after_each_job():
    """Each worker stores it, since the one that is asked for metrics cannot know the others' queues."""
    told = []
    batcher = Batcher(max_batch_tokens=100, max_concurrent_requests=100, queued=told.append)

    async def compute():
        await batcher.run(job([3, 4], FakeModel()))
        assert not told
        await asyncio.sleep(0)

    asyncio.run(compute())
    batcher.close()
    assert told == [0]


def test_too_many_inputs_are_refused(batcher):
    batcher.acquire(90)
    with pytest.raises(Refused, match="overloaded"):
        batcher.acquire(11)
    batcher.acquire(10)
    assert batcher.in_flight == 100
    batcher.release(100)
    batcher.acquire(100)


def test_what_nobody_waits_for_is_not_computed(batcher):
    model = FakeModel()
    model.go.clear()

    async def leave():
        first = asyncio.create_task(batcher.run(job([60], model)))
        await asyncio.sleep(0.05)  # it is being computed
        left = [asyncio.create_task(batcher.run(job([5, 6], model))) for _ in range(3)]
        stays = job([7], model)
        staying = asyncio.create_task(batcher.run(stays))
        await asyncio.sleep(0.05)
        assert batcher.waiting == 7
        for task in left:
            task.cancel()
        await asyncio.sleep(0)
        model.go.set()
        await asyncio.gather(first, staying)
        assert results(stays) == [7]

    asyncio.run(leave())
    assert model.batches == [[60], [7]]


def test_a_bad_input_fails_its_own_request_only(batcher, capfd):
    model = FakeModel()

    async def mixed():
        found = await asyncio.gather(
            *(batcher.run(job(lengths, model)) for lengths in ([1], [0], [2])), return_exceptions=True
        )
        broken = await asyncio.gather(batcher.run(job([13], model)), return_exceptions=True)
        await batcher.run(job([4], model))
        return found + broken

    found = asyncio.run(mixed())
    assert [getattr(error, "kind", None) for error in found] == [None, "Empty", None, "Backend"]
    assert found[3].message == "Backend error: inference failed"
    assert "the engine is broken" in capfd.readouterr().err
    assert batcher.healthy


def test_a_result_that_is_no_number_is_a_line_in_the_log(batcher, capfd):
    with pytest.raises(Refused, match="^Backend error: inference failed$"):
        asyncio.run(batcher.run(job([17])))
    assert capfd.readouterr().err == "pruneofa: error: sums: the batch: its result is infinite\n"


def test_what_cannot_be_computed_fails_its_own_request_only(batcher):
    model = FakeModel()
    model.go.clear()
    jobs = [job(lengths, model) for lengths in ([60], [1, 2], [3, 13], [4])]

    async def one_of_them_is_broken():
        first = asyncio.create_task(batcher.run(jobs[0]))
        await asyncio.sleep(0.05)  # it is being computed
        others = [asyncio.create_task(batcher.run(one)) for one in jobs[1:]]
        while batcher.waiting < 5:
            await asyncio.sleep(0.01)
        model.go.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    found = asyncio.run(one_of_them_is_broken())
    assert [getattr(error, "kind", None) for error in found] == [None, None, "Backend", None]
    assert [results(jobs[index]) for index in (1, 3)] == [[1, 2], [4]]
    assert model.batches == [[60], [1, 2, 3, 13, 4], [1, 2], [3, 13], [4]]


def test_the_thread_that_computes_finishes_each_job(batcher):
    def refuse(one):
        raise Refused("Validation", "too many dimensions")

    def value(one):
        return threading.current_thread() is not threading.main_thread() and results(one)

    model = FakeModel()
    good, bad = job([3, 5], model), job([2], model)
    good.finish, bad.finish = value, refuse

    async def both():
        return await asyncio.gather(batcher.run(good), batcher.run(bad), return_exceptions=True)

    found = asyncio.run(both())
    assert good.value == [3, 5] and found[0] is None
    assert found[1].message == "too many dimensions" and bad.value is None


def test_batches_are_reported_once_and_not_by_the_thread_that_computes():
    told = []
    batcher = Batcher(
        max_batch_tokens=4,
        max_concurrent_requests=100,
        observe=lambda *batch: told.append((*batch, threading.current_thread())),
    )

    async def ask():
        await batcher.run(job([3, 4]))
        await asyncio.sleep(0)
        batcher.report()

    asyncio.run(ask())
    batcher.close()
    assert told == [(1, 3, threading.main_thread()), (1, 4, threading.main_thread())]


def test_a_long_request_does_not_starve_a_short_one():
    model = FakeModel()
    model.go.clear()
    batcher = Batcher(max_batch_tokens=8, max_concurrent_requests=20_000)

    async def both():
        long = asyncio.create_task(batcher.run(job([1] * 10_000, model)))
        await asyncio.sleep(0.05)  # its first batch is being computed
        short = asyncio.create_task(batcher.run(job([2], model)))
        while batcher.waiting < SLICE - 8 + 1:
            await asyncio.sleep(0.01)
        model.go.set()
        await short
        long.cancel()

    asyncio.run(both())
    batcher.close()
    served = next(index for index, lengths in enumerate(model.batches) if 2 in lengths)
    assert served == SLICE // 8  # after what was left of the slice that came before it
