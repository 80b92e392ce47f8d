"""The precision that is fast on a machine."""

import pytest

from pruneofa.train.device import fast_precision


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_only_where_the_processor_computes_in_it(monkeypatch, supported):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: supported)
    assert fast_precision() == ("bf16" if supported else "fp32")
