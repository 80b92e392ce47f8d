import pytest

from tests.broken import copy
from tests.golden import source


@pytest.fixture
def model(tmp_path):
    return source(tmp_path / "model")


@pytest.fixture
def parts(monkeypatch):
    """Tensors that make no whole model may be packed, where the format is what matters."""
    monkeypatch.setattr("pruneofa.formats.pack.check_engine_runs", lambda _: None)
    monkeypatch.setattr("pruneofa.formats.pattern.check_config", lambda _: None)


@pytest.fixture
def int8(tmp_path):
    return copy("v1-int8", tmp_path)


@pytest.fixture
def fp32(tmp_path):
    return copy("v1-fp32", tmp_path)
