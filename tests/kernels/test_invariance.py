"""A token's result depends on its own sequence only: the same bits in any batch, order and number of threads."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneofa import _native
from pruneofa.engine import reference
from tests.kernels.cases import Model, batch, model, one_by_one

# Two paths of one head size each by tiles and without; hidden sizes with a short last block of LayerNorm.
SIZES = [(64, 4, 128), (64, 2, 100), (128, 2, 192), (72, 9, 100), (40, 5, 72), (96, 1, 130), (160, 5, 33)]


def joined(sequences: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """One batch of several batches, in this order."""
    lengths = [int(length) for *_, offsets in sequences for length in np.diff(offsets)]
    parts = [np.concatenate(part) for part in list(zip(*sequences, strict=True))[:3]]
    return (*parts, np.cumsum([0, *lengths]).astype(np.int32))


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    size=st.sampled_from(SIZES),
    precision=st.sampled_from(["fp32", "int8", "static"]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    activation=st.sampled_from(["gelu", "gelu_new", "relu"]),
    threads=st.integers(1, 5),
    data=st.data(),
)
def test_any_batch_order_and_threads_give_the_same_bits(lengths, size, precision, sparsity, activation, threads, data):
    hidden, heads, inner = size
    parts = model(
        hidden=hidden, heads=heads, inner=inner, precision=precision, sparsity=sparsity, activation=activation
    )
    alone = one_by_one(batch(lengths, seed=len(lengths)))
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)))) | {0, len(lengths)})
    for isa in _native.available_isas():
        one, several = parts.build(_native, isa), parts.build(_native, isa, threads)
        wanted = [one.forward(*inputs) for inputs in alone]
        for begin, end in itertools.pairwise(cuts):
            chosen = order[begin:end]
            found = several.forward(*joined([alone[index] for index in chosen]))
            np.testing.assert_array_equal(found, np.concatenate([wanted[index] for index in chosen]), isa)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_scores_too_large_for_one_query_leave_the_others_alone(isa, precision):
    """Tiles start softmax from the first 32 keys, and compute queries again whose later scores are far larger."""
    parts = model(precision=precision, depth=1, heads=2)
    field = "weight" if precision == "fp32" else "scale"
    layer = parts.layers[0]
    large = {
        name: dataclasses.replace(layer[name], **{field: getattr(layer[name], field) * np.float32(30)})
        for name in ("query", "key")
    }
    native = dataclasses.replace(parts, layers=[layer | large]).build(_native, isa, 2)
    alone = one_by_one(batch([3, 60, 90, 7, 41]))
    wanted = np.concatenate([native.forward(*inputs) for inputs in alone])
    np.testing.assert_array_equal(native.forward(*joined(alone)), wanted)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("heads", [4, 1])
def test_a_sequence_that_overflows_leaves_the_others_alone(isa, heads, precision):
    """Infinite values have weight 0 in a neighbour's attention, and 0 times infinity is NaN."""
    parts = model(precision=precision, heads=heads)
    table, scale = parts.tables["position"]
    table = table.copy()
    table[50:] = (
        np.where(np.arange(64) % 2, 127, -127) if precision == "int8" else np.where(np.arange(64) % 2, 3e38, -3e38)
    )
    scale = None if scale is None else np.where(np.arange(len(scale)) < 50, scale, np.float32(2e36)).astype(np.float32)
    parts = dataclasses.replace(parts, tables=parts.tables | {"position": (table, scale)})
    native = parts.build(_native, isa, 2)
    alone = one_by_one(batch([5, 60, 9, 70, 3]))
    wanted = [native.forward(*inputs) for inputs in alone]
    found = native.forward(*joined(alone))
    np.testing.assert_array_equal(found, np.concatenate(wanted))
    assert [bool(np.isfinite(one).all()) for one in wanted] == [True, False, True, False, True]


@pytest.mark.parametrize("size", [1e20, 1e38])
def test_infinite_scores_make_a_nan_and_not_a_wrong_number(isa, size):
    """The engine refuses what is not finite; a finite answer to weights that overflow would be believed."""
    parts = model(precision="fp32", depth=1, heads=8)  # heads of 8, in floats on every path
    layer = parts.layers[0]
    large = {
        name: dataclasses.replace(layer[name], bias=np.full_like(layer[name].bias, size)) for name in ("query", "key")
    }
    parts = dataclasses.replace(parts, layers=[layer | large])
    assert np.isnan(parts.build(_native, isa, 2).forward(*batch([5, 17]))).all()


def shifted(parts: Model, constant: float) -> Model:
    """The model with a constant added to the bias of every layer's output, which LayerNorm takes away again."""
    layers = [
        layer | {"output": dataclasses.replace(layer["output"], bias=layer["output"].bias + np.float32(constant))}
        for layer in parts.layers
    ]
    return dataclasses.replace(parts, layers=layers)


@pytest.mark.parametrize(("constant", "tolerance"), [(300, 3e-4), (3000, 3e-3), (-30000, 3e-2)])
@pytest.mark.parametrize("hidden", [64, 40, 1, 384])
def test_a_constant_added_before_layer_norm_changes_nothing(isa, hidden, constant, tolerance):
    """Beyond the rounding of the sum: half a unit in the last place of the constant, 1.2e-4 of 3000."""
    parts = model(hidden=hidden, heads=1, precision="fp32", depth=1)
    inputs = batch([5, 16, 40])
    wanted = parts.build(_native, isa).forward(*inputs)
    for threads in (1, 3):
        found = shifted(parts, constant).build(_native, isa, threads).forward(*inputs)
        assert np.abs(found - wanted).max() <= tolerance
    exact = shifted(parts, constant).build(reference, "scalar").forward(*inputs)
    assert np.abs(found - exact).max() <= tolerance


@pytest.mark.parametrize("precision", ["int8", "static"])
def test_a_constant_added_before_layer_norm_changes_no_int8_result_beyond_its_tolerance(isa, precision):
    parts = model(hidden=128, heads=2, precision=precision, depth=2)
    inputs = batch([5, 16, 40])
    wanted = parts.build(_native, isa).forward(*inputs)
    error = shifted(parts, 3000).build(_native, isa, 2).forward(*inputs) - wanted
    assert np.isfinite(error).all() and np.sqrt(np.square(error).mean()) <= 0.02


@pytest.mark.parametrize("outlier", [0, 31, 32, 63])
def test_layer_norm_of_an_outlier_is_exact(isa, outlier):
    """One feature of 1e4 among features of about 1, as trained encoders have, at the edges of a block."""
    parts = model(hidden=64, heads=2, precision="fp32", depth=1)
    layer = parts.layers[0]
    bias = layer["output"].bias.copy()
    bias[outlier] += 1e4
    parts = dataclasses.replace(parts, layers=[layer | {"output": dataclasses.replace(layer["output"], bias=bias)}])
    inputs = batch([5, 40])
    found, wanted = parts.build(_native, isa).forward(*inputs), parts.build(reference, "scalar").forward(*inputs)
    assert np.abs(found - wanted).max() <= 5e-5
