import pytest
from transformers import BertForSequenceClassification

from tests.broken import copy
from tests.golden import source
from tests.pruned import make_sparse
from tests.tiny import tiny_bert


@pytest.fixture
def model(tmp_path):
    return source(tmp_path / "model")


@pytest.fixture
def parts(monkeypatch):
    """Tensors that make no whole model may be packed, where the format is what matters."""
    monkeypatch.setattr("pruneofa.formats.pack.check_engine_runs", lambda _: None)
    for module in ("pattern", "verify"):
        monkeypatch.setattr(f"pruneofa.formats.{module}.check_config", lambda _: None)


@pytest.fixture
def int8(tmp_path):
    return copy("v1-int8", tmp_path)


@pytest.fixture
def fp32(tmp_path):
    return copy("v1-fp32", tmp_path)


@pytest.fixture
def base(tmp_path):
    """A sparse encoder."""
    make_sparse(tiny_bert()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def derived(tmp_path, base):
    """A task model that starts from it."""
    BertForSequenceClassification.from_pretrained(base).save_pretrained(tmp_path / "derived")
    return tmp_path / "derived"
