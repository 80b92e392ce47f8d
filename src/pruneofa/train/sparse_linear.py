"""Linear layers that do not multiply by locked zeros, for training in float32 on a CPU.

With the pattern locked, the output, the gradient of the input and the gradient of the weights need the kept weights
only. The model keeps its parameters: the kernels read the weights from the dense tensor in every call, and the gradient
of the weights is a dense tensor too, with +0.0 where a weight is pruned. Results differ from those of nn.Linear by
rounding, and where an input is infinite or NaN: a pruned weight does not spread it, while 0 times infinity is NaN.
"""

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pruneofa.engine.engine import choose_isa, native

# Where a step of all three products is faster than dense ones, with a margin for CPUs that were not measured (decision
# 0020).
LEAST_SPARSITY = 0.75
MOST_FEATURES = 65535  # inputs or outputs of a native pattern
_MASKED = "pruneofa_masked"  # attribute of gradients made here: their version, which counts changes in place

# Outside of the layers: a copy of a layer, or one that is loaded from a pickle, is dense.
_patterns: "WeakKeyDictionary[nn.Module, tuple[Tensor, Any]]" = WeakKeyDictionary()


class SparseLinear(nn.Linear):
    """nn.Linear that skips the locked zeros of its weight; made of one by `skip_locked_zeros`.

    It computes as nn.Linear for inputs that are not float32 on the CPU, under autocast, when its parameter has been
    replaced, and in copies.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear: (..., in) to (..., out)."""
        weight, pattern = _patterns.get(self, (None, None))
        here = weight is self.weight and all(x.dtype == torch.float32 and x.is_cpu for x in (input, self.weight))
        if not here or torch.is_autocast_enabled("cpu") or not self.weight.is_contiguous():
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        return _Products.apply(rows, self.weight, self.bias, pattern).view(*input.shape[:-1], self.out_features)


class _Products(torch.autograd.Function):
    """y = x weightᵀ + bias with the kept weights only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Any) -> Tensor:
        """x: (rows, in), weight: (out, in), bias: (out,) or None, all float32; pattern: a native Pattern."""
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern
        y = x.new_empty(len(x), len(weight))
        values = (_array(x), _array(weight), None if bias is None else _array(bias))
        pattern.multiply(*values, y.numpy(), torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        (dy,) = gradients
        needed, threads = ctx.needs_input_grad, torch.get_num_threads()
        db = dy.sum(0) if needed[2] else None
        if torch.is_grad_enabled():  # create_graph: differentiated again; the lock zeroes what is pruned
            return dy @ weight, dy.t() @ x, db, None
        dx = dw = None
        if needed[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            ctx.pattern.multiply_transposed(_array(dy), _array(weight), dx.numpy(), threads)
        if needed[1]:
            dw = torch.empty_like(weight)
            ctx.pattern.weight_gradient(_array(x), _array(dy), dw.numpy(), threads)
            setattr(dw, _MASKED, dw._version)
        return dx, dw, db, None


def is_masked(gradient: Tensor) -> bool:
    """Whether a weight's gradient is of a SparseLinear, and nothing was added to it: it is zero at pruned weights."""
    return getattr(gradient, _MASKED, None) == gradient._version


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def skip_locked_zeros(
    model: nn.Module, weights: Mapping[str, nn.Parameter], pruned: Mapping[str, Tensor]
) -> list[nn.Module]:
    """Make the linear layers of `model` whose weight is locked skip its zeros, where this is faster.

    Args:
        model: its layers must not have a `forward` of their own, as those of a FakeQuantizer do; such ones are left.
        weights: the locked weights.
        pruned: by the same names, bool of the weight's shape, True where the weight is zero and stays so.

    Returns:
        The layers that were changed, for `compute_densely`; none without the native extension.
    """
    locked = {id(weight): pruned[name] for name, weight in weights.items()}
    changed: list[nn.Module] = []
    for module in model.modules():
        if native is None or type(module) is not nn.Linear or "forward" in vars(module):
            continue
        weight, mask = module.weight, locked.get(id(module.weight))
        if mask is None or not weight.is_cpu or weight.dtype != torch.float32 or max(weight.shape) > MOST_FEATURES:
            continue
        if int(mask.count_nonzero()) >= LEAST_SPARSITY * mask.numel():
            _patterns[module] = (weight, native.Pattern((~mask).cpu().numpy(), choose_isa(None)))
            module.__class__ = SparseLinear
            changed.append(module)
    return changed


def compute_densely(layers: Iterable[nn.Module]) -> None:
    """Undo `skip_locked_zeros` for `layers`."""
    for layer in layers:
        _patterns.pop(layer, None)
        layer.__class__ = nn.Linear
