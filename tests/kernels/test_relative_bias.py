"""The bias of attention by relative position, on every path; tolerances are those of test_encoder.py."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneofa import _native
from pruneofa.engine import reference
from tests.kernels.cases import Model, batch, model, one_by_one
from tests.kernels.test_encoder import LENGTHS, check

LONGEST = 96
# hidden, heads: heads of 16, 32 and 64, which AMX multiplies in tiles or not; a head that no vector divides.
SIZES = [(64, 4), (64, 2), (128, 2), (36, 3)]


def biased(bias: np.ndarray | None = None, *, size: float = 2.0, longest: int = LONGEST, **settings) -> Model:
    """A `model` with a bias (heads, 2 · longest - 1); where none is given, random ones of this size."""
    parts = model(**settings)
    if bias is None:
        shape = (parts.heads, 2 * longest - 1)
        bias = np.random.default_rng(7).normal(0, size, shape).astype(np.float32)
    return dataclasses.replace(parts, relative_bias=bias)


def both(parts: Model, isa: str, inputs: tuple[np.ndarray, ...], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What the native encoder and the reference make of the inputs."""
    return parts.build(_native, isa, threads).forward(*inputs), parts.build(reference, "scalar").forward(*inputs)


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_are_those_of_the_reference(isa, size, precision):
    parts = biased(hidden=size[0], heads=size[1], precision=precision)
    found, wanted = both(parts, isa, batch(LENGTHS))
    check(found, wanted, precision)
    plain = dataclasses.replace(parts, relative_bias=None).build(_native, isa).forward(*batch(LENGTHS))
    assert np.abs(found - plain).max() > 0.2


@settings(max_examples=12)
@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=4), st.sampled_from(SIZES), st.integers(1, 3))
def test_sequences_of_any_length_anywhere_in_their_panels(isa, lengths, size, threads):
    parts = biased(hidden=size[0], heads=size[1], precision="fp32", depth=1, longest=max(lengths))
    check(*both(parts, isa, batch(lengths), threads), "fp32")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("heads", [2, 8])
def test_a_bias_of_zero_is_none_bit_by_bit(isa, heads, precision):
    parts = model(heads=heads, precision=precision)
    zero = biased(np.zeros((heads, 2 * LONGEST - 1), np.float32), heads=heads, precision=precision)
    inputs = batch([*LENGTHS, 70])
    np.testing.assert_array_equal(zero.build(_native, isa).forward(*inputs), parts.build(_native, isa).forward(*inputs))


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
def test_a_ragged_batch_equals_its_sequences_one_by_one(isa, precision):
    parts = biased(heads=2, precision=precision)
    inputs = batch([1, 2, 16, 15, 17, 5, 40, 8, 96, 4])
    native = parts.build(_native, isa, 2)
    alone = np.concatenate([native.forward(*inputs) for inputs in one_by_one(inputs)])
    np.testing.assert_array_equal(native.forward(*inputs), alone)


def test_the_sign_of_the_distance(isa):
    """A bias that leaves each query only the token before it, or only the one after it."""
    for step in (1, -1):
        bias = np.full((2, 2 * LONGEST - 1), -50, np.float32)
        bias[:, LONGEST - 1 + step] = 0
        found, wanted = both(biased(bias, heads=2, precision="fp32", depth=1), isa, batch([33, 5]))
        check(found, wanted, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("far", [60.0, 300.0])
def test_distant_keys_that_outweigh_the_first_ones(isa, far, precision):
    """Powers of the first keys' largest score would leave the range of a float."""
    bias = np.zeros((2, 2 * LONGEST - 1), np.float32)
    bias[:, : LONGEST - 1 - 40] = far
    found, wanted = both(biased(bias, heads=2, precision=precision, depth=1), isa, batch([96, 3, 50]))
    assert np.isfinite(found).all()
    # A score of this size is rounded in its last bits before the exponential.
    np.testing.assert_allclose(found, wanted, atol=1e-3 if precision == "fp32" else 0.2)


def test_a_bias_that_does_not_fit_is_refused(isa):
    parts = biased(longest=20)
    good = parts.relative_bias
    native = parts.build(_native, isa)
    native.forward(*batch([20, 3]))
    with pytest.raises(ValueError, match="longer than the distances of relative_bias"):
        native.forward(*batch([3, 21]))
    for bad in (good[:3], good[:, :-1], np.where(good == good[1, 1], np.nan, good), good[:, :0]):
        for module, path in ((_native, isa), (reference, "scalar")):
            with pytest.raises(ValueError, match="relative_bias: "):
                dataclasses.replace(parts, relative_bias=np.ascontiguousarray(bad)).build(module, path)
    with pytest.raises(TypeError):
        dataclasses.replace(parts, relative_bias=good.astype(np.float64)).build(_native, isa)
