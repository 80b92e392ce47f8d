"""Keep a sparsity pattern fixed during training.

The weights stay ordinary parameters and the masks are kept outside the model, so that parameter names do not change
and every checkpoint loads in plain transformers.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pruneofa.errors import CheckFailed, InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.train import masks
from pruneofa.train.sparse_linear import is_masked


class PatternLock:
    """Keeps pruned weights at exactly +0.0 and their gradients at zero.

    Gradients are zeroed by hooks on the parameters, as they are computed: gradient clipping and the all-reduce of
    data parallelism then see zeros, in any training loop and with any number of accumulated batches. Hooks cannot
    stop the optimizer's momentum, so call `apply()` after every step.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], pruned: Mapping[str, Tensor]) -> None:
        """Lock `weights` where `pruned`, bool of the weight's shape by the same names, is True.

        Raises InputError for a weight that is sharded, empty or on the meta device.
        """
        masks.check_whole(weights)
        self.weights = dict(weights)
        self.pruned = dict(pruned)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # by name: the mask it was made of, and 1 kept, 0 pruned
        self._hooks = [w.register_hook(self._hook(name)) for name, w in weights.items() if w.requires_grad]
        self.apply()

    @classmethod
    def capture(cls, model: nn.Module) -> "PatternLock":
        """Lock the weights of the encoder's linears and the pooler of `model` that are zero now.

        Warns when the encoder has no zeros, and when weights have adapters such as LoRA. Raises InputError for a
        model without encoder linears, and for parameters that are sharded, empty or on the meta device.
        """
        weights = masks.prunable(model)
        masks.check_whole(weights)
        warn_of_adapters(weights)
        lock = cls(weights, {name: weight.detach() == 0 for name, weight in weights.items()})
        if lock.sparsity()["encoder"] == 0:
            warnings.warn(
                f"{type(model).__name__} has no zeros to keep: got 0 % in its encoder, wanted a pruned model; "
                "the result will be dense: load a sparse model",
                stacklevel=2,
            )
        return lock

    def holds(self, model: nn.Module) -> bool:
        """Whether the locked parameters are the parameter objects of `model`, not copies or replacements."""
        live = {id(weight) for weight in masks.prunable(model).values()}
        return all(id(weight) in live for weight in self.weights.values())

    def on(self, model: nn.Module) -> "PatternLock":
        """Move the lock to the parameters that `model` has now, matched by name; this lock is released.

        Raises InputError naming a layer that the model lacks or that has another shape.
        """
        weights = {masks.unwrapped_name(name): (name, weight) for name, weight in masks.prunable(model).items()}
        found: dict[str, nn.Parameter] = {}
        pruned: dict[str, Tensor] = {}
        for name, mask in self.pruned.items():
            live, weight = weights.get(masks.unwrapped_name(name), (name, None))
            if weight is not None:
                masks.check_whole({live: weight})
            if weight is None or weight.shape != mask.shape:
                got = "no such layer" if weight is None else f"shape {'x'.join(map(str, weight.shape))}"
                raise InputError(
                    f"{name}: {got} in the model that is trained, wanted shape {'x'.join(map(str, mask.shape))}; "
                    "train the model whose pattern was captured"
                )
            found[live], pruned[live] = weight, mask.to(weight.device)
        self.release()
        return PatternLock(found, pruned)

    def verify_in(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Raise CheckFailed if a pruned weight is not zero in `weights`, whose names may have any wrapper prefix.

        NaN and infinity are named as such. Layers that are not in `weights` are skipped. `where` names their source
        in the error message.
        """
        positions = {masks.unwrapped_name(name): mask for name, mask in self.pruned.items()}
        for name, weight in weights.items():
            mask = positions.get(masks.unwrapped_name(name))
            if mask is None:
                continue
            masks.check_whole({name: weight})
            advice = "its parameters were replaced or loaded again: train without doing that"
            _check_zero(name, weight.detach(), mask.to(weight.device), f" in {where}", advice)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool masks by parameter name, True = kept."""
        return {name: ~pruned for name, pruned in self.pruned.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Set every pruned weight to +0.0.

        A product with 0 can be -0.0, and adding 0 makes that +0.0. On a CPU this is three times as fast as filling by
        a bool mask, and on a GPU it takes a few kernels for all weights together. A kept -0.0 becomes +0.0 too.
        """
        weights: list[Tensor] = list(self.weights.values())
        torch._foreach_mul_(weights, [self._kept_like(name, weight) for name, weight in self.weights.items()])
        torch._foreach_add_(weights, 0.0)

    @torch.no_grad()
    def verify(self) -> None:
        """Raise CheckFailed with the layer's name and the count if a pruned weight is not zero."""
        for name, weight in self.weights.items():
            pruned = self.mask_on(name, weight.device)
            _check_zero(name, weight, pruned, "", "call PatternLock.apply() after every optimizer step")

    def sparsity(self) -> dict:
        """Locked zeros: {"encoder": fraction, "pooler": fraction or None, "layers": {name: fraction}}."""
        return sparsity_of(self.weights, self.pruned)

    def state_dict(self) -> dict[str, Tensor]:
        """The pattern as packed bits: {canonical name + ".pruned": uint8 (ceil(numel / 8),)}."""
        return {f"{masks.unwrapped_name(name)}.pruned": pack(pruned) for name, pruned in self.pruned.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the pattern of `state_dict`. Raises InputError naming a layer that is missing or of another shape."""
        for name, weight in self.weights.items():
            self.pruned[name] = unpack(state, name, weight)

    def release(self) -> None:
        """Remove the hooks; the weights keep their zeros until something trains them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def mask_on(self, name: str, device: torch.device) -> Tensor:
        """The pruned positions of one weight, moved to `device` if the model was moved."""
        if self.pruned[name].device != device:
            self.pruned[name] = self.pruned[name].to(device)
        return self.pruned[name]

    def _hook(self, name: str) -> Callable[[Tensor], Tensor | None]:
        # Out of place: autograd does not allow a hook to change the gradient it is given.
        def hook(gradient: Tensor) -> Tensor | None:
            return None if is_masked(gradient) else gradient * self._kept_like(name, gradient)

        return hook

    def _kept_like(self, name: str, tensor: Tensor) -> Tensor:
        """1 where a weight is kept and 0 where it is pruned, in the dtype and on the device of `tensor`."""
        pruned = self.mask_on(name, tensor.device)
        made = self._kept.get(name)
        if made is None or made[0] is not pruned or made[1].dtype != tensor.dtype:
            made = self._kept[name] = (pruned, (~pruned).to(tensor.dtype))
        return made[1]


def _check_zero(name: str, weight: Tensor, pruned: Tensor, where: str, advice: str) -> None:
    """Raise CheckFailed if a pruned weight is not zero. NaN remains NaN when it is multiplied by 0."""
    revived = weight[(weight != 0) & pruned]
    for found, state, do in (
        (~revived.isfinite(), "NaN or infinite", "training diverged: lower lr, or train in fp32"),
        (revived != 0, "not zero", advice),
    ):
        if count := int(found.count_nonzero()):
            raise CheckFailed(f"{name}: {count} pruned weight{'s are' if count > 1 else ' is'} {state}{where}; {do}")


def warn_of_adapters(weights: Iterable[str]) -> None:
    """Warn when one of `weights` (parameter names) has a PEFT adapter.

    The lock keeps the zeros of the base weight, but merging an adapter adds a dense matrix to it.
    """
    adapted = [name for name in weights if ".base_layer." in name]
    if adapted:
        warnings.warn(
            f"{len(adapted)} pruned weights have an adapter, the first {adapted[0]}: merging it fills their "
            "zeros; deploy it unmerged, or call PatternLock.on(merged model) after merging and evaluate again",
            stacklevel=3,
        )


def sparsity_of(weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor], dense_weights: int = 0) -> dict:
    """Sparsity of the encoder, the pooler and each layer; `dense_weights` counts encoder weights not in `weights`."""
    zeros = {name: int(mask.count_nonzero()) for name, mask in pruned.items()}
    layers = {name: zeros[name] / weight.numel() for name, weight in weights.items()}
    poolers = [name for name in weights if masks.unwrapped_name(name) == POOLER_WEIGHT]
    encoder = [name for name in weights if name not in poolers]
    total = dense_weights + sum(weights[name].numel() for name in encoder)
    return {
        "encoder": sum(zeros[name] for name in encoder) / total if total else 0.0,
        "pooler": layers[poolers[0]] if poolers else None,
        "layers": layers,
    }


def pack(mask: Tensor) -> Tensor:
    """Little-endian packed bits, uint8 (ceil(numel / 8),) on the CPU, of a bool tensor of any shape."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack(state: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
    """The pruned positions of `weight` from `state`, a bool tensor of its shape on its device.

    Raises InputError when the layer is missing from the state or its number of bits differs.
    """
    packed = state.get(f"{masks.unwrapped_name(name)}.pruned")
    if packed is None or packed.numel() != -(-weight.numel() // 8):
        got = "nothing" if packed is None else f"{packed.numel()} bytes"
        raise InputError(
            f"pruning state: {got} for {name}, wanted {-(-weight.numel() // 8)} bytes of bits for shape "
            f"{'x'.join(map(str, weight.shape))}; it belongs to another model"
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=weight.numel(), bitorder="little")
    return torch.from_numpy(bits.view(bool)).view(weight.shape).to(weight.device)
