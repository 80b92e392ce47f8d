"""Damaged files of every kind: read, or refused in one line; PRUNEOFA_FUZZ_SECONDS each (default 20)."""

import os

import pytest

from tests.fuzz_files import TARGETS, fuzz

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("PRUNEOFA_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("PRUNEOFA_FUZZ_SEED", "1"))


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.timeout(int(SECONDS) + 300)
def test_files_are_read_or_refused_in_one_line(target, tmp_path):
    endings, found = fuzz(target, SECONDS, SEED, tmp_path)
    assert found == {}, found
    assert endings["refused"] > 0 or target == "log"  # whose damaged lines are skipped
