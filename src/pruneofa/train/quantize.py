"""Train and evaluate a model in the int8 arithmetic of the engine, and store the result as an ordinary folder.

The weights stay ordinary float32 parameters; scales and ranges are kept outside the model, so that parameter names
do not change.
"""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT, attention_input, base_name, embedding_weights, is_encoder_weight
from pruneofa.formats import pattern
from pruneofa.formats.scales import Quantization, QuantizationArgs
from pruneofa.formats.scales import codes as check_codes
from pruneofa.train.fake_quant import Codes, CodesLinear, Rows, exact, input_scale, weight_codes, weight_scale
from pruneofa.train.masks import prunable

EMA = 0.01  # weight of the newest batch in the moving average of a static range (docs/method.md, "Quantization")
_BINS = 2048  # bins of the histogram that percentiles are computed from


class FakeQuantizer:
    """Makes the forward pass of a model simulate the engine's int8 arithmetic, in any training loop.

    The encoder's linears and the pooler are quantized, and the embedding tables unless `embeddings` is false.
    Static activation ranges are moving averages of each batch's minimum and maximum, without padding. They are
    updated while the model is in training mode and `observing` is true. After training, `fold` replaces the weights
    by their dequantized values.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: Literal["channel", "tensor"] = "channel",
        activations: Literal["static", "dynamic"] = "static",
        embeddings: bool = True,
    ) -> None:
        """Attach to `model`. Raises InputError for a model without encoder linears."""
        prunable(model)
        self.model, self.strategy, self.static = model, weights, activations == "static"
        self.observing = True
        self.ranges: dict[str, Tensor] = {}  # by name of an input: float32 (2,), minimum and maximum
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}  # by name of a linear: scale and zero point, once final
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}  # by name of a linear: codes and scales, once final
        self._collect: Any = None
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        modules = {base_name(f"{name}.weight"): module for name, module in model.named_modules()}
        self.linears = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and (name == POOLER_WEIGHT or is_encoder_weight(name, 2))
        }
        found = {n: m for n, m in modules.items() if isinstance(m, nn.Embedding) and n in embedding_weights()}
        self.tables = found if embeddings else {}
        for name, module in self.linears.items():
            module.forward = partial(self._linear, name, module)
        for module in self.tables.values():
            module.forward = partial(self._table, module)
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @classmethod
    def of(cls, model: nn.Module, quantization: Quantization) -> "FakeQuantizer":
        """Attach to a model whose weights are exactly code * scale with the scales of `quantization`.

        Raises InputError naming a weight that is not.
        """
        self = cls(
            model,
            weights="tensor" if quantization.weights.strategy == "tensor" else "channel",
            activations="dynamic" if quantization.input_activations.dynamic else "static",
            embeddings=quantization.embeddings is not None,
        )
        for name, module in (self.linears | self.tables).items():
            lowest = quantization.lowest if name in self.linears else -127
            check_codes(name, module.weight.detach().cpu().numpy(), quantization.weight_scale[name], lowest)
        self._finish(quantization)
        return self

    def release(self) -> None:
        """Detach: the model computes in float again."""
        for hook in self._hooks:
            hook.remove()
        for module in (*self.linears.values(), *self.tables.values()):
            module.__dict__.pop("forward", None)

    def state_dict(self) -> dict[str, Tensor]:
        """Static ranges: {name of an input: float32 (2,), minimum and maximum}."""
        return {name: value.cpu() for name, value in self.ranges.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the ranges of `state_dict`. Raises InputError naming an input that is missing or unknown."""
        wanted = {input_name(name) for name in self.linears} if self.static else set()
        if wrong := sorted(wanted ^ set(state)):
            raise InputError(f"observer state: {wrong[0]} is missing or unknown; it belongs to another model")
        device = next(self.model.parameters()).device
        self.ranges = {name: value.to(device) for name, value in state.items()}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]], percentile: float | None = None) -> None:
        """Set static ranges without training, from the model's float activations on `batches` of its inputs.

        A range is the minimum and maximum of the activations. With `percentile` p it is instead the (100 - p)th to
        the pth percentile, from a histogram of 2048 bins.
        """
        if not self.static:
            return
        data, self.ranges = list(batches), {}
        seen: dict[str, Tensor] = {}

        def extremes(name: str, x: Tensor) -> None:
            found = torch.stack([x.amin(), x.amax()]).float()
            old = self.ranges.get(name, found)
            self.ranges[name] = torch.stack([torch.minimum(old[0], found[0]), torch.maximum(old[1], found[1])])

        def count(name: str, x: Tensor) -> None:
            low, high = map(float, self.ranges[name])
            seen[name] = seen.get(name, 0) + torch.histc(x.float(), _BINS, low, high).double()

        self._run(data, extremes)
        if percentile is None:
            return
        self._check_ranges()
        self._run(data, count)
        for name, (low, high) in self.ranges.items():
            share = seen[name].cumsum(0) / seen[name].sum()
            edges = torch.linspace(float(low), float(high), _BINS + 1, device=share.device)
            first = torch.searchsorted(share, 1 - percentile / 100, right=True)
            last = torch.searchsorted(share, percentile / 100)
            self.ranges[name] = torch.stack([edges[first], edges[min(int(last) + 1, _BINS)]])

    @torch.no_grad()
    def fold(self) -> Quantization:
        """Replace every quantized weight by code * scale and make the scales final; calling it again changes nothing.

        Raises InputError naming the layer whose activation range is missing, zero, NaN or infinite.
        """
        if self.static and not self._inputs:
            self._check_ranges()
        scales, inputs, kept = {}, {}, {}
        for name, module in self.linears.items():
            scale = self._weights[name][1] if name in self._weights else weight_scale(module.weight, self.strategy)
            codes = weight_codes(module.weight, scale, self.strategy)
            module.weight.copy_(codes.mul_(scale[:, None]).add_(0.0))  # + 0.0 because -0.0 is no code
            scales[name], kept[name] = scale.cpu().numpy().copy(), (module.weight != 0).cpu().numpy()
            if self.static:
                inputs[name] = self._static(name)
        for name, module in self.tables.items():
            scale = self._weights[name][1] if name in self._weights else weight_scale(module.weight, "channel")
            module.weight.copy_(weight_codes(module.weight, scale, "channel").mul_(scale[:, None]).add_(0.0))
            scales[name] = scale.cpu().numpy().copy()
        pooler = {name: kept.pop(name) for name in (POOLER_WEIGHT,) if name in kept}
        quantization = Quantization(
            weights=QuantizationArgs(self.strategy, symmetric=True),
            input_activations=QuantizationArgs("tensor" if self.static else "token", False, dynamic=not self.static),
            embeddings=QuantizationArgs("channel", symmetric=True) if self.tables else None,
            weight_scale=scales,
            input_scale={name: float(scale) for name, (scale, _) in inputs.items()},
            input_zero_point={name: int(zero) for name, (_, zero) in inputs.items()},
            pattern_hash=pattern.pattern_hash(kept),
            pooler_hash=pattern.pattern_hash(pooler) if pooler else None,
        )
        self._finish(quantization)
        return quantization

    def _finish(self, quantization: Quantization) -> None:
        for name, module in (self.linears | self.tables).items():
            scale = torch.from_numpy(quantization.weight_scale[name]).to(module.weight.device)
            strategy = self.strategy if name in self.linears else "channel"
            codes = weight_codes(module.weight.detach(), scale, strategy) if name in self.linears else scale
            self._weights[name] = (exact(codes), scale) if name in self.linears else (codes, scale)
            if name in quantization.input_scale:
                values = (quantization.input_scale[name], quantization.input_zero_point[name])
                scale, zero = (torch.tensor(float(v), device=module.weight.device) for v in values)
                self._inputs[name] = (scale, zero)
        self.observing = False

    def _run(self, batches: Iterable[Mapping[str, Tensor]], collect: Any) -> None:
        training = self.model.training
        self.model.eval()
        self._collect = collect
        try:
            for batch in batches:
                self.model(**batch)
        finally:
            self._collect = None
            self.model.train(training)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None:  # or it is passed by position
            mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        self._mask = mask.bool() if mask is not None and mask.ndim == 2 else None

    def _end(self, *_: Any) -> None:
        self._mask = self._last = None

    def _real(self, x: Tensor) -> Tensor:
        """The rows of `x` (..., columns) that are not padding, as (rows, columns)."""
        if self._mask is not None and self._mask.shape == x.shape[:-1]:
            return x[self._mask]
        return x.reshape(-1, x.shape[-1])

    def _linear(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        if self._collect is not None:
            self._collect(input_name(name), self._real(x))
            return F.linear(x, module.weight, module.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.autocast(device, enabled=False):
            codes, scale = self._codes(name, x, dtype)
            weight, each, outside = self._weight(name, module, dtype)
            y = CodesLinear.apply(codes, module.weight, module.bias, scale, weight, each, outside)
        return y.view(*x.shape[:-1], -1)

    def _table(self, module: nn.Embedding, ids: Tensor) -> Tensor:
        rows = nn.Embedding.forward(module, ids)
        return rows if self._collect is not None or self._weights else Rows.apply(rows)

    def _codes(self, name: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes and scale of the input of a linear; query, key and value share one input."""
        if self._last is not None and self._last[0] is x:
            return self._last[1:]
        rows = x.reshape(-1, x.shape[-1])
        detached = rows.detach()
        low, high = detached.amin(1), detached.amax(1)
        if not self.static:
            scale, zero_point = (value[:, None] for value in input_scale(low, high))
        else:
            if self.observing and self.model.training:
                tokens = (value.view(*x.shape[:-1], 1) for value in (low, high))
                self._observe(input_name(name), *map(self._real, tokens))
            scale, zero_point = self._static(name)
        codes = Codes.apply(rows, scale, zero_point, low, high, dtype)
        self._last = (x, codes, scale)
        return codes, scale

    def _observe(self, name: str, low: Tensor, high: Tensor) -> None:
        found = torch.stack([-low.min(), high.max()]).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        found[0].neg_()
        old = self.ranges.get(name, found)
        self.ranges[name] = old + EMA * (found - old)

    def _static(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self._inputs:
            return self._inputs[name]
        found = self.ranges.get(input_name(name))
        if found is None:
            raise InputError(f"{name}: no range of its activations is known; train a step or calibrate first")
        return input_scale(*found)

    def _weight(self, name: str, module: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes (out, in), scales (out,), and a bool mask (out, in) of clipped weights, None if there are none."""
        if name in self._weights:
            codes, scale = self._weights[name]
            return (codes if dtype == torch.float32 else codes.to(dtype)), scale, None
        weight = module.weight.detach()
        scale = weight_scale(weight, self.strategy)
        codes = weight_codes(weight, scale, self.strategy)
        outside = torch.round(weight / scale[:, None]) > 127 if self.strategy == "tensor" else None
        if not self.model.training and dtype == torch.float32:
            codes = exact(codes)
        return codes if codes.dtype == torch.float64 else codes.to(dtype), scale, outside

    def _check_ranges(self) -> None:
        for name in self.linears:
            found = self.ranges.get(input_name(name))
            if found is None:
                raise InputError(f"{name}: its activations were never observed; calibrate on data or train first")
            low, high = map(float, found)
            if not np.isfinite([low, high]).all() or low == high == 0:
                raise InputError(
                    f"{name}: its activations range from {low} to {high}, wanted a finite range other than 0; lower "
                    "the learning rate, calibrate on other examples, or use activations: dynamic"
                )


def input_name(name: str) -> str:
    """Name of the input of a linear; query, key and value of a layer share one input."""
    return f"{attention_input(name) or name.removesuffix('.weight')}.input"
