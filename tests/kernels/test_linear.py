"""Linear layers of every path against the reference, around the edges of tiles, panels and blocks.

Integer sums are equal to the last bit. Floats: `rounding` and `one_code` below are the stated tolerances.
"""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneofa import _native
from pruneofa.engine import reference
from tests.kernels.cases import Layer, float_layer, int8_layer, pairwise

OUTPUTS = (1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 129)
INPUTS = (1, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 129, 200)
TOKENS = (1, 2, 15, 16, 17, 32, 33, 48, 64, 65, 80)
SPARSITY = (0.0, 0.3, 0.5, 0.9, 1.0)
FILLS = ("random", "high", "low", "extremes", "empty rows", "full rows", "last column", "4x1", "1x4")
CODES = ("random", "zeros", "highest", "ends")
CASES = pairwise(OUTPUTS, INPUTS, TOKENS, SPARSITY, FILLS, CODES)


def codes(random, shape, kind):
    if kind == "zeros":
        return np.zeros(shape, np.uint8)
    if kind == "highest":
        return np.full(shape, 255, np.uint8)
    if kind == "ends":
        return random.choice(np.array([0, 255], np.uint8), shape)
    return random.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_integer_sums_are_those_of_the_reference(isa, outputs):
    for n, k, m, sparsity, fill, kind in CASES:
        if n != outputs:
            continue
        random = np.random.default_rng(n * 1000 + k)
        layer = int8_layer(random, n, k, sparsity, fill)
        x = codes(random, (m, k), kind)
        sums = layer.build(_native, isa).accumulate(x)
        wanted = layer.build(reference, "scalar").accumulate(x)
        assert sums.dtype == np.int32
        np.testing.assert_array_equal(sums, wanted, f"{n=} {k=} {m=} {sparsity=} {fill=} codes={kind}")


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("value", [127, -128])
def test_sums_of_the_widest_layer_fit(isa, value, sparsity):
    k = 65535
    kept = np.random.default_rng(0).random((17, k)) >= sparsity
    layer = Layer(np.where(kept, value, 0).astype(np.int8), kept, np.ones(17, np.float32), None)
    sums = layer.build(_native, isa).accumulate(np.full((1, k), 255, np.uint8))
    np.testing.assert_array_equal(sums[0], kept.sum(axis=1) * value * 255)


def test_one_input_too_many_is_refused(isa):
    k = 65536
    layer = Layer(np.zeros((1, k), np.int8), np.zeros((1, k), bool), np.ones(1, np.float32), None)
    with pytest.raises(ValueError, match="1 to 65535 inputs"):
        layer.build(_native, isa)


# Longer than the buffers between two blocks of tiles, than what a row of tiles expands to, and than a stretch of inputs
# that is added up at once: two of 9 and 8 chunks, four of 12, and 14 of which the last has one chunk.
@pytest.mark.parametrize(
    ("n", "k", "m"), [(80, 1000, 50), (40, 3072, 20), (300, 70, 130), (33, 1060, 33), (64, 3072, 70), (17, 10880, 50)]
)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.9])
def test_larger_layers(isa, n, k, m, sparsity):
    random = np.random.default_rng(1)
    layer = int8_layer(random, n, k, sparsity)
    x = random.integers(0, 256, (m, k), dtype=np.uint8)
    wanted = layer.build(reference, "scalar").accumulate(x)
    np.testing.assert_array_equal(layer.build(_native, isa).accumulate(x), wanted)


# Lists that four outputs share: around a block of outputs, one word of inputs, and one to five panels (four are
# multiplied together, so are the entries of two or four words where there are fewer).
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("pattern", ["4x1", "1x4", "random"])
def test_patterns_of_blocks_have_the_sums_of_the_reference(isa, pattern, sparsity):
    for n, k, m in pairwise((1, 3, 4, 5, 16, 18, 31, 32, 63), (1, 4, 5, 64, 65, 131, 260), (1, 16, 17, 48, 64, 65, 81)):
        random = np.random.default_rng(n + k)
        layer = int8_layer(random, n, k, sparsity, pattern)
        x = random.integers(0, 256, (m, k), dtype=np.uint8)
        wanted = layer.build(reference, "scalar").accumulate(x)
        np.testing.assert_array_equal(layer.build(_native, isa).accumulate(x), wanted, f"{n=} {k=} {m=}")


@pytest.mark.parametrize("kept_inputs", range(10))
def test_lists_of_any_length_have_the_sums_of_the_reference(isa, kept_inputs):
    """Words that are not full, and entries left over when two or four are multiplied together."""
    random = np.random.default_rng(kept_inputs)
    kept = np.zeros((8, 70), bool)
    kept[:4, random.permutation(70)[:kept_inputs]] = True  # the second block is empty
    weight = np.where(kept, random.integers(-128, 128, kept.shape), 0).astype(np.int8)
    for wanted_rows in (kept, kept & (np.arange(8) % 4 == 1)[:, None]):  # four outputs share a list, or one has it
        layer = Layer(weight * wanted_rows, wanted_rows, np.ones(8, np.float32), None)
        for m in (16, 32, 48, 64, 80):
            x = random.integers(0, 256, (m, 70), dtype=np.uint8)
            wanted = layer.build(reference, "scalar").accumulate(x)
            np.testing.assert_array_equal(layer.build(_native, isa).accumulate(x), wanted, f"{m=}")


def rounding(layer, sums, zero_point, scale):
    """What float32 loses in (sums - zero * row sums) * scales + bias: three roundings of 24 bits of each term."""
    row_sums = layer.weight.sum(axis=1, dtype=np.int64)
    terms = np.abs(sums.astype(np.float64)) + np.abs(np.outer(zero_point, row_sums))
    return 2**-22 * (terms * scale[:, None] * layer.scale + np.abs(layer.bias))


@pytest.mark.parametrize("sparsity", SPARSITY)
def test_int8_forward_differs_from_the_reference_by_rounding(isa, sparsity):
    random = np.random.default_rng(2)
    for n, k, m in pairwise(OUTPUTS, INPUTS, TOKENS)[::5]:
        layer = int8_layer(random, n, k, sparsity)
        # The step is exact and no value lies near the middle between two codes: every path finds the same codes.
        zero, step = random.integers(0, 256, (m, 1)), np.float32(2) ** random.integers(-9, 3, (m, 1))
        x = random.integers(0, 256, (m, k)) - zero + random.uniform(-0.4, 0.4, (m, k))
        x = np.clip(x, -zero, 255 - zero)
        if k > 1:
            x[:, :1], x[:, -1:] = -zero, 255 - zero
        x = (x * step).astype(np.float32)
        wanted = layer.build(reference, "scalar")
        q, scale, zero_point = reference.quantize_rows(x)
        tolerance = rounding(layer, wanted.accumulate(q), zero_point, scale)
        error = np.abs(layer.build(_native, isa).forward(x).astype(np.float64) - wanted.forward(x))
        assert (error <= tolerance).all(), (n, k, m, sparsity, (error - tolerance).max())


def test_int8_forward_of_any_floats_is_at_most_one_code_of_one_input_off(isa):
    """A kernel multiplies by 1 / scale: a value in the middle of two codes may take the other one."""
    random = np.random.default_rng(3)
    layer = int8_layer(random, 65, 129, 0.5)
    x = random.normal(size=(80, 129)).astype(np.float32)
    x[3], x[4], x[5] = 0, 7, -7  # ranges that do not cross 0 are widened to it
    x[6] *= np.float32(1e30)
    x[7] *= np.float32(1e-30)
    wanted = layer.build(reference, "scalar")
    q, scale, zero_point = reference.quantize_rows(x)
    one_code = 127 * scale[:, None] * layer.scale
    tolerance = rounding(layer, wanted.accumulate(q), zero_point, scale) + one_code
    error = np.abs(layer.build(_native, isa).forward(x).astype(np.float64) - wanted.forward(x))
    assert (error <= tolerance).all()
    assert np.mean(error > tolerance - one_code) < 0.01  # and hardly any is


@pytest.mark.parametrize("size", [1e-35, 1e-36, 1e-37, 1e-38, 1e-40, 1e-45])
def test_rows_that_are_nearly_zero_give_nearly_zero(isa, size):
    """The reciprocal of a scale below 2^-126 is infinite, and every input would have a code at an end of the range."""
    random = np.random.default_rng(7)
    layer = replace(int8_layer(random, 17, 64, 0.5), bias=None)
    x = (random.normal(size=(5, 64)) * size).astype(np.float32)
    found = layer.build(_native, isa).forward(x)
    assert np.abs(found).max() <= np.abs(x).sum(axis=1).max() * 128 * layer.scale.max()
    np.testing.assert_allclose(found, layer.build(reference, "scalar").forward(x), atol=2e-36 * layer.scale.max())


@pytest.mark.parametrize("zero", [0, 1, 100, 255])
def test_static_inputs_have_the_codes_of_their_scale(isa, zero):
    """Also far outside of the range, where codes are clipped; and rows do not see each other."""
    random = np.random.default_rng(zero)
    scale = np.float32(0.037)
    for n, k, m in ((65, 129, 40), (16, 64, 1), (33, 200, 17)):
        layer = replace(int8_layer(random, n, k, 0.5), input=(float(scale), zero))
        # In the middle of a code: dividing, and multiplying by 1 / scale, give the same one.
        x = random.integers(-300, 600, (m, k)) + random.uniform(-0.4, 0.4, (m, k))
        x[:, ::7] *= 10.0 ** random.integers(0, 30, x[:, ::7].shape)
        x = (x * scale).astype(np.float32)
        wanted = layer.build(reference, "scalar")
        sums = wanted.accumulate(reference.quantize(x, scale, zero))
        tolerance = rounding(layer, sums, np.full(m, zero), np.full(m, scale))
        found = layer.build(_native, isa).forward(x)
        assert (np.abs(found.astype(np.float64) - wanted.forward(x)) <= tolerance).all(), (n, k, m)
        exact = (sums - zero * layer.weight.sum(axis=1, dtype=np.int64)) * (scale * layer.scale) + layer.bias
        assert (np.abs(found - exact) <= tolerance).all()


def test_floats_beyond_any_static_range_are_clipped(isa):
    layer = Layer(np.full((16, 64), 1, np.int8), np.ones((16, 64), bool), np.ones(16, np.float32), None, (1e-3, 50))
    for x in (np.inf, 3e38, 1e10, 13000.0, 1e4, 5e3):  # 12583 is where the sum with 1.5 * 2^23 changes its sign
        for sign, code in ((1, 255), (-1, 0)):
            found = layer.build(_native, isa).forward(np.full((1, 64), sign * x, np.float32))
            np.testing.assert_allclose(found, 64 * (code - 50) * 1e-3, rtol=1e-6)


@pytest.mark.parametrize("sparsity", SPARSITY)
def test_float_forward_is_the_product(isa, sparsity):
    random = np.random.default_rng(4)
    for n, k, m in pairwise(OUTPUTS, INPUTS, TOKENS)[::5]:
        layer = float_layer(random, n, k, sparsity)
        x = random.normal(size=(m, k)).astype(np.float32)
        wanted = x.astype(np.float64) @ layer.weight.T.astype(np.float64) + layer.bias
        size = np.abs(x) @ np.abs(layer.weight.T) + np.abs(layer.bias)
        error = np.abs(layer.build(_native, isa).forward(x) - wanted)
        assert (error <= 1e-5 * size).all(), (n, k, m, sparsity)


def test_layers_without_bias_and_calls_without_rows(isa):
    random = np.random.default_rng(5)
    for layer in (int8_layer(random, 17, 33, 0.5), float_layer(random, 17, 33, 0.5)):
        plain = Layer(layer.weight, layer.kept, layer.scale, None)
        x = random.normal(size=(3, 33)).astype(np.float32)
        with_bias, without = layer.build(_native, isa).forward(x), plain.build(_native, isa).forward(x)
        np.testing.assert_allclose(without + layer.bias, with_bias, rtol=1e-5, atol=1e-5)
        assert plain.build(_native, isa).forward(x[:0]).shape == (0, 17)
    assert int8_layer(random, 17, 33, 0.5).build(_native, isa).accumulate(np.empty((0, 33), np.uint8)).shape == (0, 17)


def test_a_layer_says_what_it_is(isa):
    layer = int8_layer(np.random.default_rng(6), 40, 100, 0.9)
    for parts in (layer, Layer(layer.weight.astype(np.float32), layer.kept, None, None)):
        linear = parts.build(_native, isa)
        assert linear.shape == (40, 100)
        assert linear.sparsity == pytest.approx(1 - layer.kept.mean())
        assert linear.choice.startswith("sparse") and f": {100 * linear.sparsity:.1f} % zeros" in linear.choice
    dense = int8_layer(np.random.default_rng(6), 40, 100, 0.0).build(_native, isa)
    assert dense.choice.startswith("dense: 0.0 % zeros")


@settings(max_examples=40)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    m=st.integers(1, 40),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_any_shape_has_the_sums_of_the_reference(n, k, m, sparsity, seed):
    random = np.random.default_rng(seed)
    layer = int8_layer(random, n, k, sparsity, FILLS[seed % len(FILLS)])
    x = random.integers(0, 256, (m, k), dtype=np.uint8)
    wanted = layer.build(reference, "scalar").accumulate(x)
    for isa in _native.available_isas():
        np.testing.assert_array_equal(layer.build(_native, isa).accumulate(x), wanted, isa)


def test_a_layer_may_be_used_by_several_threads(isa):
    random = np.random.default_rng(7)
    linear = int8_layer(random, 65, 129, 0.5).build(_native, isa)
    x = random.integers(0, 256, (33, 129), dtype=np.uint8)
    wanted = linear.accumulate(x)
    found = []

    def work():
        for _ in range(20):
            found.append(np.array_equal(linear.accumulate(x), wanted))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80
