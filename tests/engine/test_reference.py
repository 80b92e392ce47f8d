"""The reference against formulas written another way: it defines what the kernels have to compute."""

import math

import numpy as np
import pytest

from pruneofa.engine import reference
from pruneofa.engine.reference import Encoder, Linear, attention, gelu, gelu_tanh, layer_norm, quantize_rows, softmax

random = np.random.default_rng(0)


def packed(weight):
    kept = weight != 0
    return np.packbits(kept, axis=1, bitorder="little"), weight[kept]


def test_quantized_rows_are_near_their_source_and_zero_is_exact():
    x = random.normal(size=(5, 40)).astype(np.float32)
    x[0, 3] = 0
    x[1], x[2] = np.abs(x[1]) + 1, -np.abs(x[2]) - 1  # ranges that do not cross 0 are widened to it
    q, scale, zero_point = quantize_rows(x)
    assert (q.dtype, scale.dtype, zero_point.dtype) == (np.uint8, np.float32, np.int32)
    restored = scale[:, None] * (q.astype(np.int32) - zero_point[:, None])
    assert (np.abs(restored - x) <= scale[:, None] * 1.0001).all()  # the zero point rounds too
    assert restored[0, 3] == 0
    assert zero_point[1] == 0 and zero_point[2] == 255


def test_rows_of_zeros_and_halves_quantize_as_stated():
    x = np.zeros((2, 4), np.float32)
    x[1] = [0, 0.5, 1.5, 255]  # scale 1: halves go to the even neighbour
    q, scale, zero_point = quantize_rows(x)
    assert scale.tolist() == [1, 1] and zero_point.tolist() == [0, 0]
    assert q.tolist() == [[0, 0, 0, 0], [0, 0, 2, 255]]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 8), (5, 13), (4, 64)])
def test_accumulators_are_exact_integer_sums(n, k):
    weight = random.integers(-127, 128, (n, k), dtype=np.int8) * (random.random((n, k)) < 0.5)
    bitmask, values = packed(weight.astype(np.int8))
    linear = Linear(bitmask, values, np.ones(n, np.float32), None, k, "scalar")
    x = random.integers(0, 256, (7, k), dtype=np.uint8)
    sums = linear.accumulate(x)
    assert sums.dtype == np.int32
    np.testing.assert_array_equal(sums, x.astype(np.int64) @ weight.T.astype(np.int64))
    assert linear.shape == (n, k) and linear.sparsity == 1 - len(values) / (n * k)


def test_the_widest_layer_does_not_overflow():
    k = reference.MAX_INPUTS
    bitmask = np.packbits(np.ones((1, k), bool), axis=1, bitorder="little")
    linear = Linear(bitmask, np.full(k, -128, np.int8), np.ones(1, np.float32), None, k, "scalar")
    assert linear.accumulate(np.full((1, k), 255, np.uint8)).item() == -255 * 128 * k


def test_a_kept_weight_may_round_to_zero():
    linear = Linear(np.array([[3]], np.uint8), np.array([0, 5], np.int8), np.ones(1, np.float32), None, 2, "scalar")
    assert linear.accumulate(np.array([[9, 2]], np.uint8)).tolist() == [[10]]
    assert linear.sparsity == 0


def test_int8_forward_is_the_dequantized_product():
    weight = (random.integers(-127, 128, (6, 24)) * (random.random((6, 24)) < 0.4)).astype(np.int8)
    scale, bias = random.random(6).astype(np.float32) + 0.1, random.normal(size=6).astype(np.float32)
    linear = Linear(*packed(weight), scale, bias, 24, "scalar")
    x = random.normal(size=(4, 24)).astype(np.float32)
    q, step, zero_point = quantize_rows(x)
    wanted = ((q - zero_point[:, None].astype(float)) * step[:, None]) @ (weight * scale[:, None]).T + bias
    np.testing.assert_allclose(linear.forward(x), wanted, rtol=1e-5, atol=1e-4)


def test_float_forward_is_the_product():
    weight = (random.normal(size=(6, 24)) * (random.random((6, 24)) < 0.4)).astype(np.float32)
    linear = Linear(*packed(weight), None, None, 24, "scalar")
    x = random.normal(size=(4, 24)).astype(np.float32)
    np.testing.assert_array_equal(linear.forward(x), x @ weight.T)
    with pytest.raises(ValueError, match="no integer sums"):
        linear.accumulate(x.astype(np.uint8))


def test_activations_and_norms_match_their_formulas():
    x = np.linspace(-6, 6, 101, dtype=np.float32)[None]
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x[0].tolist()]
    np.testing.assert_allclose(gelu(x)[0], exact, atol=1e-6)
    np.testing.assert_allclose(gelu_tanh(x)[0], exact, atol=1e-3)
    assert gelu(x).dtype == gelu_tanh(x).dtype == np.float32
    y = random.normal(3, 5, (4, 16)).astype(np.float32)
    normed = layer_norm(y, np.full(16, 2, np.float32), np.ones(16, np.float32), 1e-12)
    np.testing.assert_allclose(normed.mean(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(normed.std(axis=1), 2, atol=1e-5)
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0]], np.float32)), [[0.5, 0.5]])


def test_attention_sees_its_own_sequence_only():
    query, key, value = (random.normal(size=(7, 8)).astype(np.float32) for _ in range(3))
    both = attention(query, key, value, 2, np.array([0, 3, 7], np.int32))
    for part in (slice(0, 3), slice(3, 7)):
        alone = attention(query[part], key[part], value[part], 2, np.array([0, part.stop - part.start], np.int32))
        np.testing.assert_array_equal(both[part], alone)
    head = query[:3, :4] @ key[:3, :4].T / 2  # of size 4: divided by sqrt(4)
    np.testing.assert_allclose(both[:3, :4], softmax(head) @ value[:3, :4], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"isa": "neon"}, "'neon', wanted one of scalar"),
        ({"k": 17}, "17 inputs and a bitmask of 2 bytes"),
        ({"scale": None}, "int8 values without a scale"),
        ({"values": np.ones(3, np.int8)}, "3 values for 2 kept weights"),
    ],
)
def test_a_linear_whose_parts_contradict_each_other_is_refused(change, message):
    parts = {"bitmask": np.array([[1, 2]], np.uint8), "values": np.ones(2, np.int8), "scale": np.ones(1, np.float32)}
    with pytest.raises(ValueError, match=message):
        Linear(**(parts | {"bias": None, "k": 16, "isa": "scalar"} | change))


def tiny_encoder(**change):
    table = (random.normal(size=(5, 8)).astype(np.float32), None)
    norm = (np.ones(8, np.float32), np.zeros(8, np.float32))
    settings = {"hidden": 8, "heads": 2, "epsilon": 1e-12, "activation": "relu", "threads": 1, "isa": "scalar"}
    parts = {"word": table, "position": table, "token_type": None, "embedding_norm": norm, "layers": []}
    return Encoder(**(settings | parts | change))


def test_an_encoder_without_layers_is_its_embeddings():
    ids = np.array([4, 0], np.int32)
    encoder = tiny_encoder()
    out = encoder.forward(ids, np.arange(2, dtype=np.int32), np.zeros(2, np.int32), np.array([0, 2], np.int32))
    assert out.shape == (2, 8) and out.dtype == np.float32
    assert encoder.choices() == []


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [([5], [0, 1], "rows 0 to 4"), ([-1], [0, 1], "ids from -1"), ([1], [0, 2], "rise from 0 to 1"),
     ([1], [0, 0, 1], "rise from 0 to 1")],
)  # fmt: skip
def test_an_encoder_refuses_ids_and_offsets_out_of_range(ids, offsets, message):
    ids = np.array(ids, np.int32)
    with pytest.raises(ValueError, match=message):
        tiny_encoder().forward(ids, np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32), np.array(offsets))


def test_an_encoder_refuses_unknown_settings():
    with pytest.raises(ValueError, match="activation is 'swish', wanted one of gelu"):
        tiny_encoder(activation="swish")
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        tiny_encoder(heads=3)
