"""Kills, clocks that jump, and several processes on one OUT, one cache, one conversion: nothing is lost.

Each test prints its figures as a line of JSON:  python -m pytest -s -m slow tests/slow/test_faults.py | grep ^{
Full and failing disks are in test_storage.py.
"""

import collections
import os
import random
import signal
import time
from functools import partial

import pytest

from tests.slow.children import (
    COUNT,
    QUICK_FIRST,
    VERBS,
    Child,
    command,
    finished,
    out_of,
    own_cache,
    record,
    user_files,
    whole_or_absent,
)
from tests.tiny import tiny_bert, write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(10 * 3600)]


def confuse_clock(draw, folder):
    """Times of modification jump, as they do when a clock is set, or a folder is copied."""
    for path in folder.rglob("*"):
        when = time.time() + draw.uniform(-1e6, 1e6)
        os.utime(path, (when, when), follow_symlinks=False)


def jumping_time():
    draw, real = random.Random(0), time.time
    time.time = lambda: real() + draw.uniform(-1e6, 1e6)


@pytest.mark.parametrize("verb", QUICK_FIRST)
def test_kills_at_random_moments_while_the_clock_jumps(verb, straight, tmp_path):
    usual = straight[verb][1]
    draw, kills, ends, begin = random.Random(verb), 0, 0, time.monotonic()
    wanted = -(-COUNT // len(VERBS))
    while kills < wanted:
        folder = user_files(tmp_path / str(ends))
        out = out_of(verb, folder)

        def prepare(folder=folder):
            own_cache(folder)
            jumping_time()

        for _ in range(min(8, wanted - kills)):
            code, _ = Child(command(verb, out), prepare).wait(draw.uniform(0, 1.1 * usual))
            whole_or_absent(verb, out, straight)
            confuse_clock(draw, folder)
            kills += code == -signal.SIGKILL
            if code != -signal.SIGKILL:
                break
        finished(verb, out, straight)
        ends += 1
    record(test="kills", verb=verb, kills=kills, brought_to_the_end=ends, same_bytes=ends,
           seconds=round(time.monotonic() - begin))  # fmt: skip


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("verb", QUICK_FIRST)
def test_processes_on_one_out_and_one_cache(verb, processes, straight, tmp_path):
    straight[verb]  # makes what it reads
    rounds, codes = max(1, COUNT // (len(VERBS) * 10)), collections.Counter()
    for number in range(rounds):
        folder = user_files(tmp_path / str(number))
        out = out_of(verb, folder)
        children = [Child(command(verb, out), partial(own_cache, folder)) for _ in range(processes)]
        ended = [child.wait() for child in children]
        for code, said in ended:
            if code:
                reasons = ("another pruneofa is at work", "exists", "did not make it")
                assert code == 2 and any(reason in said.splitlines()[-1] for reason in reasons), said
        codes += collections.Counter(code for code, _ in ended)
        assert 0 in [code for code, _ in ended]
        finished(verb, out, straight)
    record(test="processes on one OUT and one cache", verb=verb, processes=processes, rounds=rounds, exit_codes=codes)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_on_one_cache(processes, straight, tmp_path):
    """Each writes its own OUT, and all need the same tokens."""
    outs = [out_of("prune", user_files(tmp_path / str(number))) for number in range(processes)]
    children = [Child(command("prune", out), lambda: own_cache(tmp_path)) for out in outs]
    ended = [child.wait() for child in children]
    assert [code for code, _ in ended] == [0] * processes, ended
    for out in outs:
        finished("prune", out, straight)
    record(test="processes on one cache", verb="prune", processes=processes, exit_codes={0: processes})


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_on_one_conversion(processes, straight, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    binary = tmp_path / "binary"
    write_model(binary, tiny_bert())
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    monkeypatch.setenv("PRUNEOFA_CACHE", str(tmp_path / "cache"))
    children = [Child(["inspect", str(binary), "--json"]) for _ in range(processes)]
    ended = [child.wait() for child in children]
    assert {code for code, _ in ended} == {0} and len({said for _, said in ended}) == 1
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1
    record(test="processes on one conversion", processes=processes, exit_codes={0: processes})
