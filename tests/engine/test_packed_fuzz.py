"""Damaged packed folders from the mutations of `tests/fuzz_packed.py`, without coverage: as many as a second allows."""

import sys
import time
from random import Random

import pytest

from pruneofa.errors import InputError
from tests import fuzz_packed
from tests.fuzz_mutations import Files, mutate, pack, seeds, unpack
from tests.fuzz_packed import Broken, check


def blind(part: bytes, random: Random) -> bytes:
    """One byte changed, inserted or removed."""
    place = random.randrange(len(part) + 1)
    return part[:place] + bytes(random.choices(range(256), k=random.randrange(2))) + part[place + random.randrange(2) :]


def mutated(seed: int) -> Files:
    random = Random(seed)
    return mutate(random.choice(seeds()), random, lambda part: blind(part, random))


def test_seeds_are_read_and_run(kernels, tmp_path):
    for files in seeds():
        assert unpack(pack(files)) == files
        assert check(files, tmp_path)[0] == "read and run"


@pytest.mark.parametrize("part", range(2))
def test_mutated_folders_are_read_or_refused_in_one_line(part, kernels, tmp_path):
    endings = {check(mutated(seed), tmp_path)[0] for seed in range(40 * part, 40 * part + 40)}
    assert "read and run" in endings and len(endings) > 8  # or the mutations reach nothing


def slow(folder):
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    raise InputError("late")


def greedy(folder):
    bytearray(2**24)
    raise InputError("at last")


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (slow, "s; allowed 0.2"),
        (greedy, "bytes of memory; allowed"),
        (lambda folder: fail(InputError("two\nlines")), "a message of 9 characters"),
        (lambda folder: fail(InputError("x" * 1000)), "a message of 1000 characters"),
    ],
)
def test_what_must_not_be_is_noticed(fault, message, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_packed, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz_packed, "read", fault)
    with pytest.raises(Broken, match=message):
        check(seeds()[0], tmp_path)


def test_other_exceptions_are_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_packed, "read", lambda folder: fail(KeyError("x")))
    with pytest.raises(KeyError):
        check(seeds()[0], tmp_path)


def test_the_fuzzer_follows_what_reads_folders():
    assert {"read", "read_json", "pattern_hashes"} <= {function.__name__ for function in fuzz_packed.instrumented()}


def test_without_atheris_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "atheris", None)
    monkeypatch.setattr(sys, "argv", ["fuzz_packed", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="pip install atheris"):
        fuzz_packed.main()
