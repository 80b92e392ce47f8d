import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's corpus cache."""
    monkeypatch.setenv("PRUNEOFA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def peers_without_torch() -> Iterator[None]:
    """Every peer of a benchmark is our engine, which starts in a tenth of the time."""
    from tests.peers import without_torch

    with without_torch():
        yield
