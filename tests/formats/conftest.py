import pytest

from pruneofa.formats import pack as packing
from tests.golden import source


@pytest.fixture
def model(tmp_path):
    return source(tmp_path / "model")


@pytest.fixture
def parts(monkeypatch):
    """Tensors that make no whole model may be packed, where the format is what matters."""
    monkeypatch.setattr(packing, "check_runs", lambda packed: None)
