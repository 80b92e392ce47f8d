"""What a layer refuses: every wrong argument is an exception that names it, and never a crash."""

import ctypes
import threading

import numpy as np
import pytest

from pruneofa import _native
from tests.kernels.cases import Layer, float_layer, int8_layer, model

K = 12


def parts(**change):
    """Arguments of a Linear of 3 outputs and 12 inputs with 5 weights."""
    return {
        "bitmask": np.array([[3, 0], [0, 8], [0, 3]], np.uint8),
        "values": np.arange(1, 6, dtype=np.int8),
        "scale": np.ones(3, np.float32),
        "bias": np.zeros(3, np.float32),
        "k": K,
        "isa": "scalar",
    } | change


def test_what_was_checked_is_what_is_read():
    """Another Python thread that writes to the arrays while a layer is laid out changes nothing."""
    n, k = 2048, 1536
    bitmask, values = np.full((n, k // 8), 255, np.uint8), np.ones(n * k, np.int8)
    scale, ones = np.ones(n, np.float32), np.ones((1, k), np.uint8)
    stop, memset = threading.Event(), ctypes.PyDLL(None).memset  # which holds the GIL: all is written, or nothing

    def write():
        while not stop.is_set():
            for value in (2, 1):
                memset(ctypes.c_void_p(values.ctypes.data), value, ctypes.c_size_t(values.size))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(5):
            sums = _native.Linear(bitmask, values, scale, None, k, "scalar").accumulate(ones)
            assert set(sums[0].tolist()) in ({k}, {2 * k})
    finally:
        stop.set()
        thread.join()


def test_sizes_beyond_an_int_are_refused():
    many = np.zeros(2**24 + 1, np.uint8)
    with pytest.raises(ValueError, match="bitmask: wanted at most 16777215 rows"):
        _native.Linear(many[:, None], np.zeros(0, np.int8), many.astype(np.float32), None, 8, "scalar")
    encoder = model(depth=1).build(_native, "scalar")
    three = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match="too many sequences in one call"):
        encoder.forward(three, three, three, many.astype(np.int32))


def test_the_untouched_arguments_are_taken():
    assert _native.Linear(**parts()).shape == (3, K)
    assert _native.Linear(**parts(values=np.ones(5, np.float32), scale=None)).shape == (3, K)


@pytest.mark.parametrize(
    "change",
    [
        {"bitmask": np.zeros((3, 2), np.int8)},
        {"bitmask": np.zeros((3, 2), bool)},
        {"bitmask": np.zeros(6, np.uint8)},
        {"bitmask": np.array([[3, 9, 0], [0, 9, 8], [0, 9, 3]], np.uint8)[:, ::2]},
        {"bitmask": np.asfortranarray(np.array([[3, 0], [0, 8], [0, 3]], np.uint8))},
        {"bitmask": [[3, 0], [0, 8], [0, 3]]},
        {"bitmask": None},
        {"values": np.arange(1, 6, dtype=np.uint8)},
        {"values": np.arange(1, 6, dtype=np.int32)},
        {"values": np.arange(1, 6, dtype=np.float16)},
        {"values": np.ones((5, 1), np.int8)},
        {"values": np.ones(10, np.int8)[::2]},
        {"values": None},
        {"values": np.ones(5, np.float64), "scale": None},
        {"values": np.ones(5, ">f4"), "scale": None},
        {"scale": np.ones(3)},
        {"scale": np.ones((3, 1), np.float32)},
        {"scale": np.ones(6, np.float32)[::2]},
        {"scale": None},
        {"bias": np.zeros(3)},
        {"bias": np.zeros(3, np.int32)},
        {"bias": 0.0},
        {"k": 12.0},
        {"k": 2**31},
        {"k": None},
        {"isa": None},
        {"isa": b"scalar"},
        {"input": 1.0},
        {"input": (1.0,)},
        {"input": (1.0, 1.5)},
        {"input": (1.0, 1), "values": np.ones(5, np.float32), "scale": None},
    ],
    ids=str,
)
def test_a_layer_takes_arrays_as_they_are(change):
    """Neither cast nor copied: an int32 weight silently made int8 would give wrong numbers."""
    with pytest.raises(TypeError):
        _native.Linear(**parts(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": (0.0, 0)}, "input: the scale is 0, too small, too large or NaN"),
        ({"input": (-1.0, 0)}, "input: the scale is 0, too small, too large or NaN"),
        ({"input": (float("nan"), 0)}, "input: the scale is 0, too small, too large or NaN"),
        ({"input": (float("inf"), 0)}, "input: the scale is 0, too small, too large or NaN"),
        ({"input": (1e-39, 0)}, "input: the scale is 0, too small, too large or NaN"),
        ({"input": (1e38, 0)}, "input: the scale is 0, too small, too large or NaN"),
        ({"input": (1.0, -1)}, "input: wanted a zero point from 0 to 255"),
        ({"input": (1.0, 256)}, "input: wanted a zero point from 0 to 255"),
        ({"values": np.ones(4, np.int8)}, "another number of ones than there are values"),
        ({"values": np.ones(6, np.int8)}, "another number of ones than there are values"),
        ({"values": np.empty(0, np.int8)}, "another number of ones than there are values"),
        ({"values": np.empty(0, np.float32), "scale": None}, "another number of ones than there are values"),
        ({"scale": np.array([1, np.nan, 1], np.float32)}, "a scale is not a positive finite number"),
        ({"scale": np.array([1, np.inf, 1], np.float32)}, "a scale is not a positive finite number"),
        ({"scale": np.array([1, 0, 1], np.float32)}, "a scale is not a positive finite number"),
        ({"scale": np.array([1, -1, 1], np.float32)}, "a scale is not a positive finite number"),
        ({"scale": np.ones(2, np.float32)}, "scale: wanted one per output"),
        ({"bias": np.ones(4, np.float32)}, "bias: wanted one per output"),
        ({"bias": np.ones(0, np.float32)}, "bias: wanted one per output"),
        ({"k": 8}, r"bitmask: wanted ceil\(k / 8\) bytes per row"),
        ({"k": 17}, r"bitmask: wanted ceil\(k / 8\) bytes per row"),
        ({"k": 0}, r"bitmask: wanted ceil\(k / 8\) bytes per row"),
        ({"k": -4}, r"bitmask: wanted ceil\(k / 8\) bytes per row"),
        ({"k": 9}, "bitmask: spare bits must be 0"),
        ({"bitmask": np.empty((0, 2), np.uint8), "values": np.empty(0, np.int8), "scale": np.empty(0, np.float32),
          "bias": None}, "needs 1 to 65535 inputs and 1 to"),
        ({"isa": ""}, "isa is '', but this CPU and build have"),
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_whose_parts_contradict_each_other_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _native.Linear(**parts(**change))


def test_float_weights_take_no_scale():
    """Silently leaving it out would give numbers of another size; the reference refuses too."""
    with pytest.raises((TypeError, ValueError)):
        _native.Linear(**parts(values=np.ones(5, np.float32), scale=np.full(3, 2, np.float32)))
    with pytest.raises((TypeError, ValueError)):
        _native.Linear(**parts(values=np.ones(5, np.float32), scale="none"))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 32), np.uint8), ValueError, "x: wanted one column per input"),
        (np.zeros((2, 34), np.uint8), ValueError, "x: wanted one column per input"),
        (np.zeros((2, 33), np.int8), TypeError, "incompatible"),
        (np.zeros((2, 33), np.float32), TypeError, "incompatible"),
        (np.zeros(33, np.uint8), TypeError, "incompatible"),
        (np.zeros((2, 66), np.uint8)[:, ::2], TypeError, "incompatible"),
        (np.zeros((33, 2), np.uint8).T, TypeError, "incompatible"),
        (None, TypeError, "incompatible"),
    ],
)
def test_wrong_codes_are_refused(isa, x, error, message):
    layer = int8_layer(np.random.default_rng(0), 17, 33, 0.5).build(_native, isa)
    with pytest.raises(error, match=message):
        layer.accumulate(x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 32), np.float32), ValueError, "x: wanted one column per input"),
        (np.zeros((2, 33)), TypeError, "incompatible"),
        (np.zeros((2, 33), np.uint8), TypeError, "incompatible"),
        (np.zeros((2, 66), np.float32)[:, ::2], TypeError, "incompatible"),
        (np.zeros((1, 2, 33), np.float32), TypeError, "incompatible"),
    ],
)
def test_wrong_inputs_are_refused(isa, x, error, message):
    random = np.random.default_rng(0)
    for layer in (int8_layer(random, 17, 33, 0.5), float_layer(random, 17, 33, 0.5)):
        with pytest.raises(error, match=message):
            layer.build(_native, isa).forward(x)


def test_float_layers_have_no_integer_sums(isa):
    layer = float_layer(np.random.default_rng(0), 17, 33, 0.5).build(_native, isa)
    with pytest.raises(ValueError, match="accumulate is for int8 layers"):
        layer.accumulate(np.zeros((1, 33), np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max, np.finfo(np.float32).tiny / 8])
def test_extreme_inputs_stay_in_their_row(isa, value):
    """Their own row may be anything, the others are as without them."""
    random = np.random.default_rng(1)
    for layer in (int8_layer(random, 17, 33, 0.5), float_layer(random, 17, 33, 0.5)):
        linear = layer.build(_native, isa)
        x = random.normal(size=(20, 33)).astype(np.float32)
        wanted = linear.forward(x)
        x[5, 7] = value
        found = linear.forward(x)
        np.testing.assert_array_equal(np.delete(found, 5, 0), np.delete(wanted, 5, 0))


def test_a_call_has_a_largest_size():
    layer = Layer(np.zeros((1, 1), np.int8), np.zeros((1, 1), bool), np.ones(1, np.float32), None)
    with pytest.raises(ValueError, match="x: too many rows"):
        layer.build(_native, "scalar").accumulate(np.zeros((2**24, 1), np.uint8))
    tokens = np.zeros(2**24, np.int32)
    with pytest.raises(ValueError, match="too many tokens in one call"):
        model(depth=1).build(_native, "scalar").forward(tokens, tokens, tokens, np.array([0, 2**24], np.int32))
