"""Gradual magnitude pruning for any training loop: holds the state; masks.py and schedule.py are pure functions."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pruneofa.errors import InputError
from pruneofa.train import masks
from pruneofa.train.lock import PatternLock, pack, sparsity_of, unpack, warn_of_adapters
from pruneofa.train.schedule import cubic_sparsity

SCOPES = ("uniform", "global")


class GradualPruner:
    """Prunes the encoder's linears and the pooler of `model` along a cubic schedule.

    Call `step(t)` after every optimizer step, with t counting completed optimizer steps from 0:
    backward -> clip -> optimizer -> `step(t)`. Gradients of pruned weights are zero from the backward
    pass on (hooks, see PatternLock), so that gradient clipping counts only the weights that train.

    The dense value that a pruned weight had is kept outside the model. It is restored when masks are selected
    again, so that a weight can return. This takes a second copy of the prunable weights and one byte per weight for
    the masks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        final: float,
        begin: int,
        end: int,
        stop: int,
        interval: int,
        initial: float = 0.0,
        pattern: str = "unstructured",
        scope: str = "uniform",
        skip: Iterable[str] = (),
    ) -> None:
        """Check the arguments and find the weights; nothing is pruned before `step(begin)`.

        `begin`, `end` and `stop` are the steps of the first selection, of reaching `final`, and of the last
        selection; `interval` steps lie between selections. `skip` lists regular expressions of layers to leave dense.
        Raises InputError for a bad schedule, sparsity, pattern or scope, and for a layer whose shape does
        not divide into the pattern's blocks.
        """
        _check_schedule(begin, end, stop, interval)
        _check_sparsity(initial, final, pattern, scope)
        self.begin, self.end, self.stop, self.interval = begin, end, stop, interval
        self.initial, self.final = initial, final
        self.pattern, self.scope = pattern, scope
        skip = tuple(skip)
        weights = masks.prunable(model, skip)
        if not weights:
            raise InputError(f"skip: {', '.join(skip)} leave no layer to prune; remove one")
        masks.check_whole(weights)
        warn_of_adapters(weights)
        for name, weight in weights.items():
            masks.check_shape(name, tuple(weight.shape), pattern)
        all_weights = masks.prunable(model)
        self._left_dense = sum(
            w.numel() for n, w in all_weights.items() if n not in weights and masks.canonical_name(n) != masks.POOLER
        )
        self._lock = PatternLock(weights, {n: torch.zeros_like(w, dtype=torch.bool) for n, w in weights.items()})
        self._dense = {n: torch.empty_like(w, requires_grad=False) for n, w in weights.items()}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The prunable weights by full parameter name."""
        return self._lock.weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool masks by parameter name, True = kept."""
        return self._lock.masks

    def due(self, t: int) -> bool:
        """Whether `step(t)` selects new masks."""
        on_grid = (t - self.begin) % self.interval == 0
        return self.begin <= t <= self.stop and (on_grid or t == self.end)

    @torch.no_grad()
    def step(self, t: int) -> bool:
        """Set pruned weights to zero; if t is due, select new masks first. Returns whether t was due."""
        if not self.due(t):
            self._lock.apply()
            return False
        for name, weight in self.weights.items():
            # After this the saved tensor is complete: trained values where kept, saved values where pruned.
            dense, pruned = self._dense_on(name, weight.device), self._lock.mask_on(name, weight.device)
            torch.where(pruned, dense, weight, out=dense)
        target = cubic_sparsity(t, begin=self.begin, end=self.end, final=self.final, initial=self.initial)
        for name, kept in self._select(target):
            self._lock.pruned[name] = kept.logical_not_()
            self.weights[name].copy_(self._dense[name])
        self._lock.apply()
        return True

    def sparsity(self) -> dict:
        """Pruned now: {"encoder": fraction, "pooler": fraction or None, "layers": {name: fraction}}.

        Encoder layers that `skip` leaves out count as dense.
        """
        return sparsity_of(self.weights, self._lock.pruned, self._left_dense)

    def verify(self) -> None:
        """Raise CheckFailed with the layer's name and the count if a pruned weight is not zero."""
        self._lock.verify()

    def verify_in(self, weights: Mapping[str, Tensor], where: str) -> None:
        """As `PatternLock.verify_in`: check `weights`, which may be other tensors than those that were pruned."""
        self._lock.verify_in(weights, where)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as a flat dict of CPU tensors by canonical layer name, ready for safetensors.

        `*.pruned` are the packed bits of the mask, uint8; `*.dense` are the values of the pruned weights in
        order of position, in the weight's dtype. The schedule is not part of it: it belongs to the recipe.
        """
        state: dict[str, Tensor] = {}
        for name, pruned in self._lock.pruned.items():
            dense = self._dense_on(name, pruned.device)
            state[f"{masks.canonical_name(name)}.pruned"] = pack(pruned)
            state[f"{masks.canonical_name(name)}.dense"] = dense[pruned].cpu()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load masks and dense values from `state_dict`; the model's weights are not changed.

        Raises InputError naming a layer that is missing or does not fit, before anything is changed.
        """
        pruned = {name: unpack(state, name, weight) for name, weight in self.weights.items()}
        for name, mask in pruned.items():
            dense, count = state.get(f"{masks.canonical_name(name)}.dense"), int(mask.count_nonzero())
            if dense is None or dense.numel() != count or dense.dtype != self.weights[name].dtype:
                got = "nothing" if dense is None else f"{dense.numel()} dense values of {dense.dtype}"
                raise InputError(
                    f"pruning state: {got} for {name}, wanted {count} of {self.weights[name].dtype}; "
                    "it belongs to another model or is damaged"
                )
        self._lock.pruned.update(pruned)
        for name, mask in pruned.items():
            self._dense_on(name, mask.device)[mask] = state[f"{masks.canonical_name(name)}.dense"].to(mask.device)

    def release(self) -> None:
        """Remove the gradient hooks; call this when pruning is finished and the model is used further."""
        self._lock.release()

    def _select(self, sparsity: float) -> Iterator[tuple[str, Tensor]]:
        if self.scope == "global":
            yield from masks.global_masks(self._dense, sparsity, self.pattern)
        else:
            for name, dense in self._dense.items():
                yield name, masks.magnitude_mask(dense, sparsity, self.pattern)

    def _dense_on(self, name: str, device: torch.device) -> Tensor:
        if self._dense[name].device != device:
            self._dense[name] = self._dense[name].to(device)
        return self._dense[name]


def _check_schedule(begin: int, end: int, stop: int, interval: int) -> None:
    if begin < 0:
        raise InputError(f"begin is {begin} but must be at least 0")
    if begin >= end:
        raise InputError(f"begin is {begin} but must be below end ({end}); lower begin")
    if stop < end:
        raise InputError(f"stop is {stop} but must be at least end ({end}): masks are selected until stop")
    if interval < 1:
        raise InputError(f"interval is {interval} but must be at least 1 step")


def _check_sparsity(initial: float, final: float, pattern: str, scope: str) -> None:
    for key, value in {"final": final, "initial": initial}.items():
        if not 0 <= value < 1:
            raise InputError(f"{key} is {value} but must be at least 0 and below 1 (a fraction, not percent)")
    if initial > final:
        raise InputError(f"initial is {initial} but must not exceed final ({final})")
    if scope not in SCOPES:
        raise InputError(f"scope is {scope!r}; wanted {' or '.join(SCOPES)}")
    only = masks.final_of(pattern)
    if only is not None and abs(final - only) > 1e-9:
        raise InputError(f"final is {final} but pattern {pattern} gives {only:g}; set final to that")
