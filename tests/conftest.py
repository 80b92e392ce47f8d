import gc
import os
import signal

import hypothesis
import pytest

# A shell ignores SIGINT in background jobs, and children inherit that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

gc.disable()  # until all tests are collected

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's corpus cache."""
    monkeypatch.setenv("PRUNEOFA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def peers_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer of a benchmark is our engine, which starts in a tenth of the time.

    By the test's own `monkeypatch`, so that what the test patches on top is taken back before this.
    """
    from tests.peers import without_torch

    without_torch(monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with short tests last: several processes, which take a file each, then end at about the same time."""
    items.sort(key=lambda item: item.nodeid.startswith(("tests/formats/", "tests/kernels/")))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Leave what is there before a file's tests, a million objects of libraries, out of its garbage collections.

    The Trainer collects in every training: looking through them takes longer than to train a tiny model.
    """
    gc.collect()
    gc.freeze()
