"""Products with a fixed pattern, for training, on every path against NumPy in float64."""

import os

import numpy as np
import pytest

from pruneofa import _native
from tests.kernels.cases import pairwise

OUTPUTS = (1, 3, 8, 15, 16, 17, 33, 64, 65)
INPUTS = (1, 4, 7, 8, 9, 31, 64, 100)
TOKENS = (0, 1, 3, 8, 9, 16, 17, 31, 33, 64, 65, 130, 300)
KEPT = (0.0, 0.1, 0.5, 1.0)
FILLS = ("random", "empty rows", "empty columns", "one column")
CASES = pairwise(OUTPUTS, INPUTS, TOKENS, KEPT, FILLS)


def pattern(random, n, k, kept, fill):
    mask = random.random((n, k)) < kept
    if fill == "empty rows":
        mask[::2] = False
    if fill == "empty columns":
        mask[:, ::2] = False
    if fill == "one column":
        mask[:, :-1] = False
    return mask


def floats(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def products(mask, x, weight, bias, dy, isa, threads=1):
    """y, dx and dw, into arrays that hold NaN before."""
    made = _native.Pattern(mask, isa)
    y, dx, dw = (np.full(shape, np.nan, np.float32) for shape in (dy.shape, x.shape, weight.shape))
    made.multiply(x, weight, bias, y, threads)
    made.multiply_transposed(dy, weight, dx, threads)
    made.weight_gradient(x, dy, dw, threads)
    return y, dx, dw


def near(found, a, b, added=0.0):
    """`found` is a @ b + added up to the rounding of float32 sums: relative to the sum of the absolute products."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    limit = 2.0**-22 * (4 + a.shape[1] ** 0.5) * (np.abs(a) @ np.abs(b) + np.abs(added))
    assert found.shape == limit.shape
    assert (np.abs(found - (a @ b + added)) <= limit).all()


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_products_are_those_of_the_dense_matrix(isa, outputs):
    for n, k, tokens, kept, fill in CASES:
        if n != outputs:
            continue
        random = np.random.default_rng(n * 1000 + k)
        mask = pattern(random, n, k, kept, fill)
        x, dy, bias = floats(random, tokens, k), floats(random, tokens, n), floats(random, n)
        weight = np.where(mask, floats(random, n, k), 0).astype(np.float32)
        for added in (bias, None):
            y, dx, dw = products(mask, x, weight, added, dy, isa)
            near(y, x, weight.T, 0.0 if added is None else added)
            near(dx, dy, weight)
            near(dw[mask], *sampled(dy, x, mask))
            assert not dw[~mask].view(np.int32).any()  # +0.0


def sampled(dy, x, mask):
    """dyᵀx at the kept positions as one product: (positions, tokens) rows times ones."""
    n, k = mask.nonzero()
    return dy.T[n].astype(np.float64) * x.T[k], np.ones(len(x))


@pytest.mark.parametrize("tokens", [1, 33, 257])
def test_results_do_not_depend_on_the_number_of_threads(isa, tokens):
    random = np.random.default_rng(0)
    mask = random.random((70, 90)) < 0.2
    x, dy, bias = floats(random, tokens, 90), floats(random, tokens, 70), floats(random, 70)
    weight = floats(random, 70, 90)
    wanted = products(mask, x, weight, bias, dy, isa)
    for threads in (2, 3, 5):
        for one, other in zip(products(mask, x, weight, bias, dy, isa, threads), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_a_token_gets_does_not_depend_on_the_others(isa):
    random = np.random.default_rng(1)
    mask = random.random((40, 50)) < 0.2
    x, dy, weight = floats(random, 150, 50), floats(random, 150, 40), floats(random, 40, 50)
    y, dx, _ = products(mask, x, weight, None, dy, isa)
    for begin, end in ((0, 1), (5, 22), (100, 150)):
        some = products(mask, x[begin:end], weight, None, dy[begin:end], isa)
        np.testing.assert_array_equal(some[0], y[begin:end])
        np.testing.assert_array_equal(some[1], dx[begin:end])


def test_what_is_not_finite_spreads_by_kept_weights_only(isa):
    random = np.random.default_rng(2)
    mask = random.random((20, 30)) < 0.3
    weight = np.where(mask, floats(random, 20, 30), 0).astype(np.float32)
    x, dy = floats(random, 40, 30), floats(random, 40, 20)
    x[3, 7], dy[5, 2] = np.inf, np.nan
    y, dx, dw = products(mask, x, weight, None, dy, isa)
    assert np.array_equal(~np.isfinite(y), (np.arange(40) == 3)[:, None] & mask[:, 7])
    assert np.array_equal(~np.isfinite(dx), (np.arange(40) == 5)[:, None] & mask[2])
    rows, columns = np.arange(20)[:, None] == 2, np.arange(30) == 7
    assert np.array_equal(~np.isfinite(dw), mask & (rows | columns))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_that_is_forked_off_starts_threads_of_its_own():
    random = np.random.default_rng(3)
    mask, x, dy = random.random((40, 40)) < 0.2, floats(random, 200, 40), floats(random, 200, 40)
    wanted = products(mask, x, floats(random, 40, 40), None, dy, "scalar", 2)
    child = os.fork()
    if child == 0:
        dw = products(mask, x, floats(random, 40, 40), None, dy, "scalar", 2)[2]
        os._exit(0 if np.array_equal(dw, wanted[2]) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (65536, 1), (1, 65536)])
def test_a_size_out_of_range_is_refused(shape):
    with pytest.raises(ValueError, match="1 to 65535 outputs and inputs"):
        _native.Pattern(np.ones(shape, bool), "scalar")


@pytest.mark.parametrize("change", [
    {"x": (5, 3)}, {"weight": (3, 5)}, {"weight": (4, 3)}, {"bias": (4,)}, {"y": (5, 4)}, {"y": (4, 3)}, {"threads": 0},
    {"threads": 4097},
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(change):
    given = {"x": (5, 4), "weight": (3, 4), "bias": (3,), "y": (5, 3)} | change
    threads = given.pop("threads", 1)
    made = _native.Pattern(np.ones((3, 4), bool), "scalar")
    with pytest.raises(ValueError, match="wanted"):
        made.multiply(**{name: np.zeros(shape, np.float32) for name, shape in given.items()}, threads=threads)


def test_other_sizes_of_the_gradients_are_refused():
    made = _native.Pattern(np.ones((3, 4), bool), "scalar")
    x, dy, weight, wrong = (np.zeros(shape, np.float32) for shape in ((5, 4), (5, 3), (3, 4), (2, 2)))
    for call in (
        lambda: made.multiply_transposed(wrong, weight, x, 1),
        lambda: made.multiply_transposed(dy, weight, wrong, 1),
        lambda: made.multiply_transposed(dy, wrong, x, 1),
        lambda: made.multiply_transposed(dy, weight, x, 0),
        lambda: made.weight_gradient(wrong, dy, weight, 1),
        lambda: made.weight_gradient(x, wrong, weight, 1),
        lambda: made.weight_gradient(x, dy, wrong, 1),
        lambda: made.weight_gradient(x, dy, weight, 0),
    ):
        with pytest.raises(ValueError, match="wanted"):
            call()


@pytest.mark.parametrize("wrong", [
    np.zeros((5, 4)), np.zeros((5, 8), np.float32)[:, ::2], np.asfortranarray(np.zeros((5, 4), np.float32)), None,
])  # fmt: skip
def test_arrays_of_another_type_or_order_are_refused(wrong):
    made = _native.Pattern(np.ones((3, 4), bool), "scalar")
    with pytest.raises(TypeError):
        made.multiply(wrong, np.zeros((3, 4), np.float32), None, np.zeros((5, 3), np.float32), 1)
    with pytest.raises(TypeError):  # a copy would be written to, and lost
        made.multiply_transposed(np.zeros((5, 3), np.float32), np.zeros((3, 4), np.float32), wrong, 1)


def test_read_only_results_are_refused():
    y = np.zeros((5, 3), np.float32)
    y.flags.writeable = False
    made = _native.Pattern(np.ones((3, 4), bool), "scalar")
    with pytest.raises(TypeError):
        made.multiply(np.zeros((5, 4), np.float32), np.zeros((3, 4), np.float32), None, y, 1)
