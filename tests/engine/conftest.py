import pytest

from pruneofa.engine import engine, reference


@pytest.fixture(params=["reference", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Engines of the test run on the NumPy reference, then on the native kernels."""
    if request.param == "reference":
        monkeypatch.setattr(engine, "native", reference)
        monkeypatch.delenv("PRUNEOFA_ISA", raising=False)  # it has one path only
    elif engine.native is None:
        pytest.skip(f"the native kernels were not built: {engine._not_built}")
    return request.param
