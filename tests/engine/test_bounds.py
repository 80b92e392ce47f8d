"""No number of a pass exceeds the bounds by which models are refused."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pruneofa.engine import bounds, reference
from pruneofa.formats.convert import pack_linear

SIZES = st.integers(1, 40)


@given(st.integers(0, 2**32 - 1), SIZES, SIZES, st.sampled_from(["fp32", "int8"]), st.floats(0.01, 100))
def test_outputs_are_within_their_bound(seed, inputs, outputs, precision, size):
    random = np.random.default_rng(seed)
    gamma, beta, bias = ((random.normal(size=count) * size).astype(np.float32) for count in (inputs, inputs, outputs))
    weight = pack_linear((random.normal(size=(outputs, inputs)) * size).astype(np.float32), precision)
    x = reference.layer_norm((random.standard_t(2, (5, inputs)) * size).astype(np.float32), gamma, beta, 1e-12)
    total = bounds.sum_after_norm((gamma, beta))
    assert np.abs(x).sum(axis=1).max() <= total * (1 + 1e-5)
    linear = reference.Linear(weight.bitmask, weight.values, weight.scale, bias, inputs, "scalar")
    assert np.abs(linear.forward(x)).max() <= bounds.largest_output((weight, bias), total) * 1.02  # codes of x round
