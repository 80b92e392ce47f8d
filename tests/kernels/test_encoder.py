"""The native encoder against the reference, on every path.

Stated tolerances, for outputs of a LayerNorm, whose size is about 1:
- float weights: FLOAT for each value. The sums of float32 in another order, and the polynomials of docs/kernels.md.
- int8 weights: where no code comes out one off, FLOAT as well. But a float that differs in its last bit may take the
  next code, one 255th of a token's range further, and a changed code changes floats: RMS and LARGEST for such a batch.
- int8 weights with inputs quantized by the token: on AMX and AVX-512 with BF16 attention rounds its operands
  to bfloat16 where heads are a multiple of 32, and on AMX GELU is in half precision, which changes codes everywhere.
  All that they may add to the distance from float weights, which int8 makes, is ROUGH of it.
"""

import dataclasses
import gc
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneofa import _native
from pruneofa.engine import reference
from tests.kernels.cases import batch, model, one_by_one

FLOAT = 5e-5
RMS, LARGEST = 0.02, 0.2
ROUGH = 0.05
# hidden, heads and inner: heads of 8, 16, 32 and 64; then heads that no vector or tile divides, hidden sizes that are
# no multiple of 64, 32, 16 or 4, a head of three 32s, a single number.
SIZES = [(64, 8, 128), (64, 4, 100), (64, 2, 256), (128, 2, 192), (72, 9, 100), (40, 5, 72), (36, 3, 50), (20, 5, 33),
         (96, 1, 130), (96, 3, 64), (1, 1, 1)]  # fmt: skip
LENGTHS = [5, 16, 1, 33, 17]


def check(found, wanted, precision):
    assert found.dtype == np.float32 and found.shape == wanted.shape
    error = np.abs(found.astype(np.float64) - wanted)
    if precision == "fp32":
        assert error.max() <= FLOAT
    else:
        assert error.max() <= LARGEST
        assert np.sqrt(np.square(error).mean()) <= RMS


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_are_those_of_the_reference(isa, size, sparsity, precision):
    hidden, heads, inner = size
    parts = model(hidden=hidden, heads=heads, inner=inner, sparsity=sparsity, precision=precision)
    inputs = batch(LENGTHS)
    check(parts.build(_native, isa).forward(*inputs), parts.build(reference, "scalar").forward(*inputs), precision)


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(isa, activation, precision):
    parts = model(activation=activation, precision=precision)
    inputs = batch(LENGTHS)
    check(parts.build(_native, isa).forward(*inputs), parts.build(reference, "scalar").forward(*inputs), precision)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 96])
@pytest.mark.parametrize("heads", [8, 2, 1])
def test_lengths_around_panels(isa, length, heads):
    """One sequence, alone and after another that shifts it within its panels."""
    parts = model(heads=heads, precision="fp32", depth=1)
    native, wanted = parts.build(_native, isa), parts.build(reference, "scalar")
    for lengths in ([length], [3, length, 2]):
        inputs = batch(lengths)
        check(native.forward(*inputs), wanted.forward(*inputs), "fp32")


@pytest.mark.parametrize("precision", ["int8", "static"])
def test_int8_outputs_are_exact_to_float_rounding_unless_a_code_differs(isa, precision):
    """Short sequences keep a differing code to themselves, so most tokens of one layer have none."""
    parts = model(depth=1, precision=precision, activation="gelu" if precision == "static" else "gelu_new")
    inputs = batch([1, 2, 3] * 60)
    error = np.abs(parts.build(_native, isa).forward(*inputs) - parts.build(reference, "scalar").forward(*inputs))
    assert np.mean(error.max(axis=1) <= FLOAT) > 0.75
    assert error.max() <= LARGEST


@pytest.mark.parametrize("size", [(64, 2, 128), (128, 2, 192), (96, 1, 130), (64, 4, 129)], ids=str)
def test_bfloat16_in_attention_and_half_precision_in_gelu_are_small_beside_int8(isa, size):
    hidden, heads, inner = size
    inputs = batch([40, 96, 3, 64])
    ratios = []
    for seed in range(4):
        codes = model(hidden=hidden, heads=heads, inner=inner, precision="int8", seed=seed)
        wanted = codes.in_floats().build(reference, "scalar").forward(*inputs)
        rounded, exact = (
            float(np.square(codes.build(module, path).forward(*inputs) - wanted).mean() ** 0.5)
            for module, path in ((_native, isa), (reference, "scalar"))
        )
        ratios.append(rounded / exact)
    assert np.mean(ratios) <= 1 + ROUGH


@pytest.mark.parametrize("size", [4e2, 2e4, 4e5])
def test_activations_up_to_the_largest_half_and_beyond(isa, size):
    """Up to 65504 they are as exact as others. Beyond they are cut off there on AMX, and do not disturb small ones."""
    parts = model(depth=1)
    layer = parts.layers[0]
    bias = np.random.default_rng(0).normal(size=layer["intermediate"].bias.shape).astype(np.float32)
    bias[: len(bias) // 2] *= size
    bias = np.clip(bias, -1e30, 6e4 if size < 1e5 else np.inf)
    layer = layer | {"intermediate": dataclasses.replace(layer["intermediate"], bias=bias)}
    parts = dataclasses.replace(parts, layers=[layer])
    found, wanted = (
        parts.build(module, path).forward(*batch([17, 30])) for module, path in ((_native, isa), (reference, "scalar"))
    )
    assert np.isfinite(found).all()
    if size < 1e5:
        assert np.sqrt(np.square(found - wanted).mean()) <= RMS


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
def test_encoders_without_token_types_ignore_them(isa, precision):
    parts = model(types=0, precision=precision)
    ids, positions, types, offsets = batch(LENGTHS)
    wanted = parts.build(reference, "scalar").forward(ids, positions, types, offsets)
    check(parts.build(_native, isa).forward(ids, positions, types + 99, offsets), wanted, precision)


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(isa, threads, precision):
    """More threads than heads or blocks leave some without work."""
    for hidden, heads in ((64, 4), (40, 5), (96, 1)):
        parts = model(hidden=hidden, heads=heads, precision=precision)
        inputs = batch(LENGTHS)
        native = parts.build(_native, isa, threads)
        check(native.forward(*inputs), parts.build(reference, "scalar").forward(*inputs), precision)


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
@pytest.mark.parametrize("threads", [1, 3])
def test_results_repeat_bit_by_bit(isa, threads, precision):
    """Also after a larger and a smaller batch have used the same buffers, and in another encoder."""
    parts = model(precision=precision)
    inputs = batch(LENGTHS)
    native = parts.build(_native, isa, threads)
    first = native.forward(*inputs)
    for lengths in ([3], [96, 40, 7], [1]):
        native.forward(*batch(lengths, seed=1))
        np.testing.assert_array_equal(native.forward(*inputs), first)
    np.testing.assert_array_equal(parts.build(_native, isa, threads).forward(*inputs), first)


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
def test_a_ragged_batch_equals_its_sequences_one_by_one(isa, precision):
    parts = model(heads=2, precision=precision)
    inputs = batch([1, 2, 3, 16, 15, 17, 5, 1, 1, 40, 8, 96, 4])  # many share panels
    native = parts.build(_native, isa, 2)
    alone = np.concatenate([native.forward(*inputs) for inputs in one_by_one(inputs)])
    np.testing.assert_array_equal(native.forward(*inputs), alone)


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
def test_a_sequence_does_not_depend_on_its_neighbours(isa, precision):
    parts = model(precision=precision)
    lengths = [5, 9, 20]
    ids, positions, types, offsets = batch(lengths)
    native = parts.build(_native, isa, 2)
    first = native.forward(ids, positions, types, offsets)
    ids[:5], ids[14:] = (ids[:5] + 7) % 50, (ids[14:] + 3) % 50
    second = native.forward(ids, positions, types, offsets)
    np.testing.assert_array_equal(second[5:14], first[5:14])
    assert (second[:5] != first[:5]).any() and (second[14:] != first[14:]).any()


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
def test_paths_agree(precision):
    parts = model(precision=precision, sparsity=0.9)
    inputs = batch(LENGTHS)
    first, *others = (parts.build(_native, isa).forward(*inputs) for isa in _native.available_isas())
    for other in others:
        check(other, first, precision)


@pytest.mark.parametrize(("heads", "factor"), [(4, 40), (2, 40), (2, 8), (1, 8)])
def test_float_scores_too_large_for_exp(isa, heads, factor):
    """Attention of scores in the hundreds is the one value with the greatest score, not a NaN.

    Also where the greatest score comes after many that are smaller by more than a float can hold: tiles go through the
    keys by the 32, and see it late.
    """
    parts = model(precision="fp32", depth=1, heads=heads)
    large = parts.layers[0] | {
        name: dataclasses.replace(parts.layers[0][name], weight=parts.layers[0][name].weight * factor, bias=None)
        for name in ("query", "key")
    }
    parts = dataclasses.replace(parts, layers=[large])
    inputs = batch([17, 30, 96])
    found = parts.build(_native, isa).forward(*inputs)
    # Scores of 1e4 keep three digits after the point.
    np.testing.assert_allclose(found, parts.build(reference, "scalar").forward(*inputs), atol=2e-2)


@pytest.mark.parametrize("factor", [40, 100, 200, 400])
def test_int8_scores_too_large_for_exp(isa, factor):
    """They are rounded by more than 1, so that another token may win; but one does."""
    parts = model(precision="int8", depth=1, heads=2)
    large = {name: dataclasses.replace(parts.layers[0][name], scale=parts.layers[0][name].scale * factor)
             for name in ("query", "key")}  # fmt: skip
    parts = dataclasses.replace(parts, layers=[parts.layers[0] | large])
    found = parts.build(_native, isa).forward(*batch([17, 30, 96]))
    assert np.isfinite(found).all()
    error = np.abs(found - parts.build(reference, "scalar").forward(*batch([17, 30, 96])))
    assert np.mean(error.max(axis=1) > LARGEST) < 0.5


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    heads=st.integers(1, 6),
    size=st.sampled_from([4, 8, 12, 16, 20, 32]),
    inner=st.integers(1, 150),
    sparsity=st.floats(0, 1),
    threads=st.integers(1, 4),
    precision=st.sampled_from(["fp32", "int8", "static"]),
    seed=st.integers(0, 2**32),
)
def test_any_sizes(lengths, heads, size, inner, sparsity, threads, precision, seed):
    parts = model(
        hidden=heads * size, heads=heads, inner=inner, sparsity=sparsity, precision=precision, depth=1, seed=seed
    )
    inputs = batch(lengths, seed=seed)
    wanted = parts.build(reference, "scalar").forward(*inputs)
    for isa in _native.available_isas():
        check(parts.build(_native, isa, threads).forward(*inputs), wanted, precision)


def at_once(works):
    """Run the functions at the same time; their results in order."""
    results: list = [None] * len(works)

    def run(index):
        results[index] = works[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_several_python_threads_share_an_encoder(isa):
    native = model().build(_native, isa, 2)
    inputs = [batch([length, 3], seed=length) for length in (1, 9, 17, 40)]
    wanted = [native.forward(*one) for one in inputs]
    found = at_once([lambda one=one: [native.forward(*one) for _ in range(10)] for one in inputs])
    for results, one in zip(found, wanted, strict=True):
        for result in results:
            np.testing.assert_array_equal(result, one)


def test_arrays_that_change_meanwhile(isa):
    """What was checked is what is computed: ids that another thread makes wrong are refused or not seen."""
    native = model().build(_native, isa, 2)
    ids, *others = batch([9, 40, 80] * 10)
    right, wanted = ids.copy(), native.forward(ids, *others)
    done = threading.Event()

    def change():
        while not done.is_set():
            ids[:] = 2**31 - 1
            ids[:] = right

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(100):
            try:
                found = native.forward(ids, *others)
            except ValueError:
                continue
            np.testing.assert_array_equal(found, wanted)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("precision", ["fp32", "int8", "static"])
def test_parts_lanes_and_width_change_nothing(isa, precision):
    native = model(precision=precision).build(_native, isa, 4)
    *arrays, offsets = batch([9, 17, 3, 40, 1, 80, 16])
    wanted = native.forward(*arrays, offsets)
    for parts in ([0, 7], [0, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7]):
        for lanes, width in ((1, 4), (2, 2), (4, 1), (3, None)):
            found = native.forward(*arrays, offsets, np.array(parts, np.int32), lanes, width)
            assert len(found) in offsets[parts[1:]]  # on a slow machine it returns early
            np.testing.assert_array_equal(found, wanted[: len(found)], f"{parts} {lanes} {width}")


@pytest.mark.parametrize(
    ("division", "message"),
    [
        ({"parts": [0]}, "parts must increase from 0 to the number of sequences"),
        ({"parts": []}, "parts must increase"),
        ({"parts": [0, 1]}, "parts must increase"),
        ({"parts": [0, 3]}, "parts must increase"),
        ({"parts": [1, 2]}, "parts must increase"),
        ({"parts": [0, 2, 1, 2]}, "parts must increase"),
        ({"parts": [0, 0, 2]}, "parts must increase"),
        ({"lanes": 0}, "lanes: wanted 1 to the number of threads"),
        ({"lanes": 3}, "lanes: wanted"),
        ({"width": 0}, "width: wanted 1 to the number of threads / lanes"),
        ({"width": 2, "lanes": 2}, "width: wanted"),
    ],
)
def test_wrong_divisions_are_refused(division, message):
    native = model().build(_native, "scalar", 2)
    if "parts" in division:
        division = {"parts": np.array(division["parts"], np.int32)}
    with pytest.raises(ValueError, match=message):
        native.forward(*batch([3, 9]), **division)


def test_several_encoders_run_at_once(isa):
    natives = [model(seed=seed).build(_native, isa, 2) for seed in range(3)]
    inputs = batch(LENGTHS)
    wanted = [native.forward(*inputs) for native in natives]
    found = at_once([lambda native=native: [native.forward(*inputs) for _ in range(10)] for native in natives])
    for results, one in zip(found, wanted, strict=True):
        for result in results:
            np.testing.assert_array_equal(result, one)


def test_encoders_on_different_paths_run_at_once():
    """Tile registers of one thread are not left configured for another."""
    isas = _native.available_isas()
    natives = [model().build(_native, isa, 2) for isa in isas]
    inputs = batch(LENGTHS)
    wanted = [native.forward(*inputs) for native in natives]
    found = at_once([lambda native=native: native.forward(*inputs) for native in natives])
    for isa, result, one in zip(isas, found, wanted, strict=True):
        np.testing.assert_array_equal(result, one, isa)


def test_choices_name_every_linear_layer(isa):
    choices = dict(model(depth=2, sparsity=0.9).build(_native, isa).choices())
    assert list(choices)[:2] == ["layer.0.query", "layer.0.key"] and len(choices) == 12
    assert all(choice.startswith("sparse") and " % zeros" in choice for choice in choices.values())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_of_tables_are_kept_and_not_copied(precision):
    parts = model(precision=precision)
    inputs = batch(LENGTHS)
    wanted = parts.build(reference, "scalar").forward(*inputs)
    encoder = parts.build(_native, "scalar")
    rows = [weakref.ref(values) for values, _ in parts.tables.values()]
    del parts
    gc.collect()
    assert all(alive() is not None for alive in rows)
    check(encoder.forward(*inputs), wanted, precision)
    del encoder
    assert [alive() for alive in rows] == [None] * 3


def test_tables_that_are_refused_are_let_go():
    parts = model()
    rows = weakref.ref(parts.tables["word"][0])
    with pytest.raises(ValueError, match="hidden"):
        dataclasses.replace(parts, heads=3).build(_native, "scalar")
    del parts
    gc.collect()
    assert rows() is None
