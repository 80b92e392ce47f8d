"""What a machine can do with a path: the figures that a measurement is compared with."""

import math
import time

import numpy as np
import pytest

from pruneofa import _native
from tests.kernels.cases import int8_layer


def test_figures_are_positive_and_a_layer_does_not_exceed_them(isa):
    peaks = [_native.arithmetic_peak(isa, int8, threads) for int8 in (True, False) for threads in (1, 2)]
    assert all(math.isfinite(peak) and peak > 1e6 for peak in peaks), peaks
    linear = int8_layer(np.random.default_rng(0), 256, 256, 0.0).build(_native, isa)
    x = np.random.default_rng(1).integers(0, 256, (64, 256), np.uint8)
    peak, seconds = peaks[0], []
    for _ in range(8):  # other programs may take the CPU whenever one of the two is measured
        start = time.perf_counter()
        linear.accumulate(x)
        seconds.append(time.perf_counter() - start)
        peak = max(peak, _native.arithmetic_peak(isa, True, 1))
    assert 0 < 2 * 64 * 256 * 256 / min(seconds) < 1.3 * peak


def test_memory_is_not_faster_than_a_cache(isa):
    cache, memory = (max(_native.read_bandwidth(isa, size, 1) for _ in range(3)) for size in (64 << 10, 64 << 20))
    assert math.isfinite(cache) and 1e6 < memory < 1.3 * cache
    assert _native.read_bandwidth(isa, 1, 3) > 0


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="isa is 'sse'"):
        _native.arithmetic_peak("sse", True, 1)
    with pytest.raises(ValueError, match="isa is 'sse'"):
        _native.read_bandwidth("sse", 1024, 1)
    for threads in (0, -1, 5000):
        with pytest.raises(ValueError, match="threads: wanted 1 to 4096"):
            _native.arithmetic_peak("scalar", True, threads)
    for size in (0, 2**40 + 1):
        with pytest.raises(ValueError, match="bytes: wanted 1 to 2\\^40"):
            _native.read_bandwidth("scalar", size, 1)
