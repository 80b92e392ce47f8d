"""Fake quantization as pure functions: the int8 arithmetic of the engine on tensors, with straight-through gradients.

A quantized linear multiplies integers (codes minus their zero point), which bfloat16 represents exactly. The gradient
of rounding is 1; the gradient of a value that was clipped is 0.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pruneofa.formats.packed import MAX_SCALE

_CHUNK = 1 << 17  # elements processed at a time: temporaries stay in cache, and all threads have work
_EXACT = 2**24  # float32 sums of integers are exact below this
_SMALLEST = 2.0**-149


def weight_scale(weight: Tensor, strategy: str) -> Tensor:
    """Scales, float32 (rows,), of a weight (rows, columns): max|row| / 127, or max|weight| / 127.5 for all rows.

    The scale of an all-zero row (or weight) is 1. Scales are clamped so that none is 0 and 127 * scale is finite.
    """
    largest = torch.maximum(weight.amax(1), -weight.amin(1)).float()
    if strategy == "tensor":
        largest = largest.max().expand(len(weight))
    scale = (largest / (127.5 if strategy == "tensor" else 127.0)).clamp(_SMALLEST, float(MAX_SCALE))
    return scale.masked_fill(largest == 0, 1.0)


def weight_codes(weight: Tensor, scale: Tensor, strategy: str) -> Tensor:
    """Integer codes, float32 (rows, columns): clip(rint(weight / scale), -127, 127), from -128 for strategy tensor."""
    lowest = -128 if strategy == "tensor" else -127
    return (weight.float() / scale[:, None]).round_().clamp_(lowest, 127)


def input_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32, of uint8 activations in [low, high], extended to include 0."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = (high - low) / 255.0
    scale = scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)  # as in `reference.quantize_rows`
    return scale, torch.round(-low / scale)


class Codes(torch.autograd.Function):
    """Integers clip(rint(x / scale) + zero_point, 0, 255) - zero_point, in a dtype that represents them exactly."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Codes of the rows of `x`.

        Args:
            ctx: the autograd context.
            x: (rows, columns), any float dtype.
            scale: float32, shape () or (rows, 1).
            zero_point: float32, shape of `scale`: the code of 0.
            low: (rows,), minimum of each row. A gradient mask is stored only for rows with values outside the range.
            high: (rows,), maximum of each row.
            dtype: float32 or bfloat16.

        Returns:
            (rows, columns) of `dtype`. `backward` expects the gradient with respect to codes * scale.
        """
        first, last = -zero_point, 255 - zero_point
        codes = torch.empty(x.shape, dtype=dtype, device=x.device)
        for rows in _chunks(x):
            part = (x[rows].float() / _of_rows(scale, rows)).round_()  # never in place: .float() may be x itself
            codes[rows] = torch.clamp(part, _of_rows(first, rows), _of_rows(last, rows), out=part)
        if ctx.needs_input_grad[0]:
            flat, below, above = (value.reshape(-1) for value in (scale, first, last))
            beyond = (torch.round(low.float() / flat) < below) | (torch.round(high.float() / flat) > above)
            rows = beyond.nonzero().squeeze(-1)
            part = torch.round(x[rows].float() / _of_rows(scale, rows))
            outside = (part < _of_rows(first, rows)) | (part > _of_rows(last, rows))
            ctx.save_for_backward(rows, outside)
        return codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient unchanged, and 0 where the code was clipped."""
        rows, outside = ctx.saved_tensors
        (gradient,) = gradients
        if len(rows):
            gradient = gradient.clone()
            gradient[rows] = gradient[rows].masked_fill(outside, 0.0)
        return gradient, None, None, None, None, None


class CodesLinear(torch.autograd.Function):
    """y = codes · weight codesᵀ · (input scale · weight scale) + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        codes: Tensor,
        each: Tensor,
        outside: Tensor | None,
    ) -> Tensor:
        """The output of one quantized linear.

        Args:
            ctx: the autograd context.
            x: (rows, in), output of `Codes`.
            weight: (out, in), the float weight; used only to return its gradient.
            bias: (out,) or None.
            scale: float32, shape () or (rows, 1), the scale of the input.
            codes: (out, in), codes of the weight in the dtype of `x`, or in float64 where float32 sums would round.
            each: float32 (out,), the scales of the weight.
            outside: bool (out, in), True where the weight was clipped; None if nowhere.

        Returns:
            (rows, out), dtype of `x`.
        """
        y = x.to(codes.dtype) @ codes.t()
        if codes.dtype == torch.float64:
            y = y.float()
        for rows in _chunks(y):
            part = y[rows].float() * (_of_rows(scale, rows) * each)
            y[rows] = part if bias is None else part.add_(bias)
        ctx.save_for_backward(x, scale, codes, each, outside)
        ctx.bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of a linear layer whose input and weight are the dequantized values (codes * scale)."""
        x, scale, codes, each, outside = ctx.saved_tensors
        (gradient,) = gradients
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = gradient @ (codes * each[:, None]).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            if scale.ndim == 0:
                for_weight = (gradient.t() @ x.to(gradient.dtype)).float().mul_(scale)
            else:
                for_weight = (gradient.t() @ (x * scale).to(gradient.dtype)).float()
            if outside is not None:
                for_weight.masked_fill_(outside, 0.0)
        if ctx.bias and ctx.needs_input_grad[2]:
            for_bias = gradient.sum(0, dtype=torch.float32)
        return for_x, for_weight, for_bias, None, None, None, None


class Rows(torch.autograd.Function):
    """Fake-quantized rows of an embedding table, with one scale per row, which covers the row: nothing is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Dequantized rows, codes * scale, of x (..., columns)."""
        rows = x.reshape(-1, x.shape[-1])
        scale = weight_scale(rows, "channel")
        return (weight_codes(rows, scale, "channel") * scale[:, None]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient unchanged (straight-through)."""
        return gradients[0]


def exact(codes: Tensor) -> Tensor:
    """Codes of a weight in a dtype in which sums of products with activation codes are exact."""
    return codes if float(codes.abs().sum(1).max()) * 255 < _EXACT else codes.double()


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of rows of `x` that are processed at a time; on a GPU one slice of all rows."""
    size = len(x) if x.is_cuda else max(1, _CHUNK // x.shape[1])
    return (slice(start, start + size) for start in range(0, len(x), size))


def _of_rows(value: Tensor, rows: Any) -> Tensor:
    """`value` if it is a scalar, which applies to all rows; otherwise its entries for `rows`."""
    return value if value.ndim == 0 else value[rows]
