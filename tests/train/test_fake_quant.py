import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pruneofa.engine import reference
from pruneofa.formats.convert import quantize_weight
from pruneofa.train.fake_quant import Codes, CodesLinear, Rows, exact, input_scale, weight_codes, weight_scale

ANY = st.floats(-(2.0**127), 2.0**127, width=32)
ORDINARY = st.floats(-100, 100, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=ANY | ORDINARY | st.just(0.0))
SPANNED = st.floats(-(2.0**126), 2.0**126, width=32)  # so that the range of a row is finite
ordinary = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=ORDINARY)
STRATEGIES = ["channel", "tensor"]


def by_tensor(weight):
    """The paper's codes of a weight: -128..127 of one scale, max|w| / 127.5, in NumPy."""
    scale = np.abs(weight).max() / np.float32(127.5)
    scale = np.float32(1) if not weight.any() else np.maximum(scale, np.float32(2**-149))
    return np.clip(np.rint(weight / scale), -128, 127), np.full(len(weight), scale, np.float32)


def of_inputs(x, scale, zero_point):
    """Codes less the zero point of a static range, in NumPy and float32."""
    with np.errstate(over="ignore"):
        codes = np.clip(np.rint(x / np.float32(scale)) + np.float32(zero_point), 0, 255)
    return codes - np.float32(zero_point)


def codes_of(x, scale, zero_point, dtype=torch.float32):
    return Codes.apply(x, scale, zero_point, x.detach().amin(1), x.detach().amax(1), dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(matrices)
def test_weights_equal_the_numpy_reference(strategy, weight):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, scales = quantize_weight(weight) if strategy == "channel" else by_tensor(weight)
    scale = weight_scale(torch.from_numpy(weight), strategy)
    np.testing.assert_array_equal(scale.numpy(), scales)
    np.testing.assert_array_equal(weight_codes(torch.from_numpy(weight), scale, strategy).numpy(), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(matrices)
def test_quantizing_what_was_dequantized_changes_nothing_and_keeps_every_zero(strategy, weight):
    weight = torch.from_numpy(weight)
    scale = weight_scale(weight, strategy)
    codes = weight_codes(weight, scale, strategy)
    back = codes * scale[:, None]
    assert back.isfinite().all()
    assert torch.equal(weight_codes(back, scale, strategy), codes)
    assert (back[weight == 0] == 0).all()
    assert codes.min() >= (-128 if strategy == "tensor" else -127) and codes.max() <= 127


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=SPANNED,
    )
)
def test_inputs_of_each_token_equal_the_engines(x):
    expected, scales, zeros = reference.quantize_rows(x)
    rows = torch.from_numpy(x)
    scale, zero_point = input_scale(rows.amin(1), rows.amax(1))
    np.testing.assert_array_equal(scale.numpy(), scales)
    np.testing.assert_array_equal(zero_point.numpy(), zeros)
    codes = codes_of(rows, scale[:, None], zero_point[:, None])
    np.testing.assert_array_equal(codes.numpy() + zeros[:, None], expected)
    again = codes_of(codes * scale[:, None], scale[:, None], zero_point[:, None])
    assert torch.equal(again, codes) and not codes[rows == 0].any()


@given(ordinary, st.floats(-50, 0, width=32), st.floats(0, 50, width=32))
def test_inputs_of_a_static_range_equal_the_reference_also_beyond_it(x, low, high):
    scale, zero_point = input_scale(torch.tensor(low), torch.tensor(high))
    assert 0 <= zero_point <= 255
    kept = x.copy()
    codes = codes_of(torch.from_numpy(x), scale, zero_point)
    np.testing.assert_array_equal(codes.numpy(), of_inputs(x, scale.item(), zero_point.item()))
    np.testing.assert_array_equal(x, kept)  # what is read stays as it was
    small = codes_of(torch.from_numpy(x), scale, zero_point, torch.bfloat16)
    assert torch.equal(small.float(), codes)  # bfloat16 holds every code


@given(ordinary, st.floats(-50, 0, width=32), st.floats(0, 50, width=32), st.booleans())
def test_the_gradient_is_that_of_clamp(x, low, high, by_token):
    x = torch.from_numpy(x).requires_grad_()
    if by_token:
        scale, zero_point = (v[:, None] for v in input_scale(x.detach().amin(1), x.detach().amax(1)))
    else:
        scale, zero_point = input_scale(torch.tensor(low), torch.tensor(high))
    upstream = torch.arange(1, x.numel() + 1, dtype=torch.float32).view(x.shape)
    codes_of(x, scale, zero_point).backward(upstream)
    whole = (torch.round(x.detach() / scale) + zero_point).requires_grad_()
    whole.clamp(0, 255).backward(upstream)
    assert torch.equal(x.grad, whole.grad)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("by_token", [False, True])
def test_a_linear_has_the_gradients_of_its_dequantized_self(strategy, by_token):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 7), (3, 7), (3,)))
    low, high = (x.detach().amin(1), x.detach().amax(1)) if by_token else (torch.tensor(-1.0), torch.tensor(1.5))
    scale, zero_point = input_scale(low, high)
    if by_token:
        scale, zero_point = scale[:, None], zero_point[:, None]
    each = weight_scale(weight.detach(), strategy)
    codes = weight_codes(weight.detach(), each, strategy)
    outside = torch.round(weight.detach() / each[:, None]) > 127 if strategy == "tensor" else None
    inputs = codes_of(x, scale, zero_point)
    y = CodesLinear.apply(inputs, weight, bias, scale, codes, each, outside)
    upstream = torch.randn(5, 3)
    y.backward(upstream)
    found = [x.grad, weight.grad, bias.grad]

    plain_x = (inputs.detach() * scale).requires_grad_()
    plain_weight = (codes * each[:, None]).requires_grad_()
    plain_bias = bias.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(plain_x, plain_weight, plain_bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    expected.backward(upstream)
    unclipped = torch.round(x.detach() / scale) + zero_point
    inside = (unclipped >= 0) & (unclipped <= 255)
    assert inside.all() == by_token
    if outside is not None:
        assert outside.sum() == (weight.detach().max() == weight.detach().abs().max())
        plain_weight.grad.masked_fill_(outside, 0.0)
    for one, other in zip(found, [plain_x.grad * inside, plain_weight.grad, plain_bias.grad], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6), st.booleans())
def test_a_linear_gives_the_engines_reference_bit_for_bit(seed, dense):
    random = np.random.default_rng(seed)
    k = int(random.integers(1, 900))
    weight = random.standard_normal((4, k)).astype(np.float32)
    weight[random.random(weight.shape) < (0.0 if dense else 0.9)] = 0
    x = (random.standard_normal((3, k)) * 3 + 1).astype(np.float32)
    bias = random.standard_normal(4).astype(np.float32)
    codes, scale = quantize_weight(weight)
    kept = codes != 0
    bits = np.packbits(kept, axis=1, bitorder="little")
    expected = reference.Linear(bits, codes[kept], scale, bias, k, "scalar").forward(x)
    rows = torch.from_numpy(x)
    each, zero_point = (v[:, None] for v in input_scale(rows.amin(1), rows.amax(1)))
    inputs, weight_codes = codes_of(rows, each, zero_point), exact(torch.from_numpy(codes).float())
    found = CodesLinear.apply(inputs, torch.from_numpy(weight), torch.from_numpy(bias), each, weight_codes,
                              torch.from_numpy(scale), None)  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), expected)


def test_sums_that_float32_would_round_are_taken_in_float64():
    assert exact(torch.full((2, 518), 127.0)).dtype == torch.float32
    codes = exact(torch.full((2, 600), 127.0))
    assert codes.dtype == torch.float64
    inputs = torch.full((1, 600), 255.0)
    inputs[0, 0] = 254
    y = CodesLinear.apply(inputs, codes, None, torch.tensor(1.0), codes, torch.ones(2), None)
    assert y.tolist() == [[float(np.float32(599 * 255 * 127 + 254 * 127))] * 2]


def test_rows_of_a_table_are_rounded_by_themselves_and_pass_the_gradient_on():
    table = torch.randn(9, 6)
    table[0] = 0
    ids = torch.tensor([[0, 3, 3], [8, 1, 0]])
    x = table[ids].requires_grad_()
    y = Rows.apply(x)
    codes, scale = quantize_weight(table.numpy())
    np.testing.assert_array_equal(y.detach().numpy(), (codes.astype(np.float32) * scale[:, None])[ids.numpy()])
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)
