"""Linear layers that do not multiply by locked zeros, for training in float32 on a CPU.

With the pattern locked, the output, the gradient of the input and the gradient of the weights need the kept weights
only. The model keeps its parameters: the kernels read the weights from the dense tensor in every call, and the gradient
of the weights is a dense tensor too, with +0.0 where a weight is pruned. Results differ from those of nn.Linear by
rounding, and where an input is infinite or NaN: a pruned weight does not spread it, while 0 times infinity is NaN.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pruneofa.engine.engine import choose_isa, native

# Where a step of all three products is faster than dense ones, with a margin for CPUs that were not measured (decision
# 0020).
LEAST_SPARSITY = 0.75
MOST_FEATURES = 65535  # inputs or outputs of a native pattern
_MASKED = "pruneofa_masked"  # attribute of gradients made here: their version, which counts changes in place

# The native pattern of a layer, its weight, and the state of that when its pruned values were last known to be zero.
# Outside of the layers: a copy of a layer, or one that is loaded from a pickle, is dense.
_patterns: "WeakKeyDictionary[nn.Module, tuple[Any, Tensor, tuple[int, int]]]" = WeakKeyDictionary()


class SparseLinear(nn.Linear):
    """nn.Linear that skips the locked zeros of its weight; made of one by `skip_locked_zeros`.

    It computes as nn.Linear in evaluation mode, for inputs that are not float32 on the CPU, under autocast, when its
    parameter was replaced, or changed in place since the lock zeroed it (`weight.data.add_(x)`, which PyTorch does not
    record, is not seen), in copies, and under torch.compile and the transforms of torch.func.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear: (..., in) to (..., out)."""
        if not self.training or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().forward(input)
        pattern, weight, zeroed = _patterns.get(self, (None, None, None))
        supported = weight is self.weight and all(x.dtype == torch.float32 and x.is_cpu for x in (input, self.weight))
        if not supported or torch.is_autocast_enabled("cpu") or zeroed != _state(self.weight):
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
    """Whether a weight's gradient is of a SparseLinear, and nothing was added to it: it is zero at pruned weights.

    A hook that writes through `gradient.data` is not seen: PyTorch does not record that either.
    """
    return getattr(gradient, _MASKED, None) == gradient._version


def _state(weight: Tensor) -> tuple[int, int]:
    """Differs after a change in place and after `weight.data = other`."""
    return weight.data_ptr(), weight._version


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def skip_locked_zeros(
    model: nn.Module, weights: Mapping[str, nn.Parameter], pruned: Mapping[str, Tensor]
) -> list[nn.Module]:
    """Make the linear layers of `model` whose weight is locked skip its zeros, where this is faster.

    Args:
        model: layers that have a `forward` of their own, as those of a FakeQuantizer do, are left.
        weights: the locked weights.
        pruned: by the same names, bool of the weight's shape, True where the weight is zero and stays so.

    Returns:
        The layers that were changed, for `note_zeroed` after every step and for `compute_densely`; none without the
        native extension. Raises InputError when the variable PRUNEOFA_ISA names instructions that this CPU lacks.
    """
    locked = {id(weight): pruned[name] for name, weight in weights.items()}
    changed: list[nn.Module] = []
    for module in model.modules():
        if native is None or type(module) is not nn.Linear or "forward" in vars(module):
            continue
        weight, mask = module.weight, locked.get(id(module.weight))
        if mask is None or not weight.is_cpu or weight.dtype != torch.float32 or max(weight.shape) > MOST_FEATURES:
            continue
        if weight.is_contiguous() and int(mask.count_nonzero()) >= LEAST_SPARSITY * mask.numel():
            kept = (~mask).cpu().contiguous().numpy()
            _patterns[module] = (native.Pattern(kept, choose_isa(None)), weight, _state(weight))
            module.__class__ = SparseLinear
            changed.append(module)
    return changed


def can_skip(*, processes: int, reduced: bool, compiled: bool) -> bool:
    """Whether training may skip locked zeros: by one process, in float32, and eagerly. Else a SparseLinear is dense.

    Args:
        processes: that train together.
        reduced: whether they compute in bf16 or fp16.
        compiled: by torch.compile.
    """
    return processes == 1 and not reduced and not compiled


def note_zeroed(layers: Iterable[nn.Module]) -> None:
    """Say that the pruned weights of `layers` are zero now; until then, a change in place made the layers dense."""
    for layer in layers:
        if layer in _patterns:
            pattern, weight, _ = _patterns[layer]
            _patterns[layer] = (pattern, weight, _state(weight))


def compute_densely(modules: Iterable[nn.Module]) -> None:
    """Undo `skip_locked_zeros` for every SparseLinear of `modules`."""
    for module in modules:
        if type(module) is SparseLinear:
            _patterns.pop(module, None)
            cast(Any, module).__class__ = nn.Linear
