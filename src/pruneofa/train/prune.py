"""Gradual pruning for any training loop: holds the state; masks.py, scores.py and schedule.py are pure functions."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pruneofa.errors import CheckFailed, InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.recipe.pretraining import REFITTED
from pruneofa.train import masks
from pruneofa.train.lock import PatternLock, pack, sparsity_of, unpack, warn_of_adapters
from pruneofa.train.schedule import cubic_sparsity
from pruneofa.train.scores import SCORES, fisher_scores, obs_scores, obs_update, older_share

SCOPES = ("uniform", "global")


class GradualPruner:
    """Prunes the encoder's linears and the pooler of `model` along a cubic schedule.

    Call `step(t)` after every optimizer step, with t counting completed optimizer steps from 0:
    backward -> clip -> optimizer -> `step(t)`. Gradients of pruned weights are zero from the backward
    pass on (hooks, see PatternLock), so that gradient clipping counts only the weights that train.

    The dense value that a pruned weight had is kept outside the model, except with scores obs and hessian. It is
    restored when masks are selected again, so that a weight can return. This takes a second copy of the prunable
    weights, and the masks five bytes per weight.

    `score` says which weights are pruned first; fisher and obs need `step(t, curvature)` where t is due:

    - magnitude: the smallest.
    - fisher: the smallest w^2 F_ii. `curvature` is {name: mean squared gradient (out, in)}, such as
      `curvature.second_moments(optimizer, pruner.weights)`; a weight that it lacks, or of which all are 0, gets the
      mean over the others, and is so compared by its magnitude. A pruned weight has no gradient, and Adam's average of
      its squares decays to 0. Its mean is therefore kept with its dense value as it was when the weight was pruned, in
      a third copy of the weights. When the weight returns, the steps without a gradient are left out of the average,
      which goes on from the mean that was kept, as that of entries without a gradient does in PyTorch's SparseAdam; the
      shares of old and new gradients in it add up to 1, as in Adam's correction of the bias (Kingma and Ba 2015, arXiv
      1412.6980, section 3), so that the estimate has no bias either.
    - obs: the smallest w^2 / (F^-1)_ii; the others are updated for it. `curvature` is {name: blocks of F}, such as
      `curvature.fisher_blocks` makes. A pruned weight does not return, so `end` is the last selection.
    - hessian: those that are 0 already. Where t is due, call `layerwise.prune_layerwise` before `step(t)`, with
      `target(t)` as `final`: it chooses the weights and fits the others, and any may return. As each selection takes
      long, `end` is the last.
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
        score: str = "magnitude",
        dampening: float = 0.01,
        decay: float = 0.999,
    ) -> None:
        """Check the arguments and find the weights; nothing is pruned before `step(begin)`.

        `begin`, `end` and `stop` are the steps of the first selection, of reaching `final`, and of the last
        selection; `interval` steps lie between selections. `skip` lists regular expressions of layers to leave dense.
        `dampening`, for score obs, is added to the diagonal of F, relative to its mean in a layer. `decay`, for score
        fisher, is that of the averages over steps which `step` is given, Adam's second beta; 0 if they are none.
        Raises InputError for a bad schedule, sparsity, pattern, scope or score, and for a layer whose shape does
        not divide into the pattern's blocks.
        """
        check_schedule(begin, end, stop, interval)
        check_sparsity(initial, final, pattern, scope)
        check_score(score, dampening, decay)
        self.begin, self.end, self.stop, self.interval = begin, end, stop, interval
        self.initial, self.final = initial, final
        self.pattern, self.scope = pattern, scope
        self.score, self.dampening, self.decay = score, dampening, decay
        masks.refuse_string(skip)
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
            w.numel() for n, w in all_weights.items() if n not in weights and masks.unwrapped_name(n) != POOLER_WEIGHT
        )
        self._lock = PatternLock(weights, {n: torch.zeros_like(w, dtype=torch.bool) for n, w in weights.items()})
        kept = {} if score in REFITTED else weights
        self._dense = {n: torch.empty_like(w, requires_grad=False) for n, w in kept.items()}
        # Mean squared gradients where pruned; elsewhere what must be added to the curvature that `step` is given.
        fisher = weights if score == "fisher" else {}
        self._diagonal = {n: torch.zeros_like(w, requires_grad=False) for n, w in fisher.items()}

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
        last = self.end if self.score in REFITTED else self.stop
        selects = self.begin <= t <= last and (on_grid or t == self.end)
        return selects and (self.score not in REFITTED or self.target(t) > 0)  # at 0 it would cost and do nothing

    def target(self, t: int) -> float:
        """The sparsity that a selection in `step(t)` leads to."""
        return cubic_sparsity(t, begin=self.begin, end=self.end, final=self.final, initial=self.initial)

    @torch.no_grad()
    def step(self, t: int, curvature: Mapping[str, Tensor] | None = None) -> bool:
        """Set pruned weights to zero; if t is due, select new masks first. Returns whether t was due.

        `curvature`: see the class; not needed where t is not due. Raises InputError if it is missing there, or with
        score hessian too few weights are 0, and CheckFailed if it is not finite, or weights should be pruned and all of
        it is 0 (score fisher).
        """
        if not self.due(t):
            self._lock.apply()
            return False
        if self.score in ("fisher", "obs") and curvature is None:
            raise InputError(f"score {self.score}: step({t}) selects masks and needs the curvature; pass it")
        for name in self._dense:
            # After this the saved tensor is complete: trained values where kept, saved values where pruned.
            weight = self.weights[name]
            dense, pruned = self._on(self._dense, name, weight.device), self._lock.mask_on(name, weight.device)
            torch.where(pruned, dense, weight, out=dense)
        target = self.target(t)
        for name, kept in self._select(self._scores(t, curvature or {}, target), target):
            pruned = kept.logical_not_()
            if self.score == "obs":
                self._remove(name, pruned, curvature or {})
            elif self.score == "hessian":
                self._refuse_kept(name, pruned, t)
            else:
                self.weights[name].copy_(self._dense[name])
            if self.score == "fisher" and curvature and name in curvature:
                diagonal = self._diagonal[name]
                torch.where(pruned, diagonal, diagonal - curvature[name].to(diagonal), out=diagonal)
            self._lock.pruned[name] = pruned
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
        order of position, in the weight's dtype, not with scores obs and hessian; `*.diagonal`, with score fisher, in
        the weight's shape, are mean squared gradients of pruned weights, and of others what Adam's averages lack.
        The schedule is not part of it: it belongs to the recipe.
        """
        state: dict[str, Tensor] = {}
        for name, pruned in self._lock.pruned.items():
            layer = masks.unwrapped_name(name)
            state[f"{layer}.pruned"] = pack(pruned)
            if name in self._dense:
                state[f"{layer}.dense"] = self._on(self._dense, name, pruned.device)[pruned].cpu()
            if name in self._diagonal:
                state[f"{layer}.diagonal"] = self._diagonal[name].to("cpu", copy=True)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load masks and dense values from `state_dict`; the model's weights are not changed.

        Raises InputError naming a layer that is missing or does not fit, before anything is changed.
        """
        pruned = {name: unpack(state, name, weight) for name, weight in self.weights.items()}
        for name, mask in pruned.items():
            sizes = {"dense": int(mask.count_nonzero())} if name in self._dense else {}
            sizes |= {"diagonal": mask.numel()} if name in self._diagonal else {}
            for kind, count in sizes.items():
                stored = state.get(f"{masks.unwrapped_name(name)}.{kind}")
                if stored is None or stored.numel() != count or stored.dtype != self.weights[name].dtype:
                    got = "nothing" if stored is None else f"{stored.numel()} {kind} values of {stored.dtype}"
                    raise InputError(
                        f"pruning state: {got} for {name}, wanted {count} of {self.weights[name].dtype}; "
                        "it belongs to another model or is damaged"
                    )
        self._lock.pruned.update(pruned)
        for name, mask in pruned.items():
            layer = masks.unwrapped_name(name)
            if name in self._dense:
                self._on(self._dense, name, mask.device)[mask] = state[f"{layer}.dense"].to(mask.device)
            if name in self._diagonal:
                self._diagonal[name].copy_(state[f"{layer}.diagonal"].view_as(mask))

    def release(self) -> None:
        """Remove the gradient hooks; call this when pruning is finished and the model is used further."""
        self._lock.release()

    def _scores(self, t: int, curvature: Mapping[str, Tensor], target: float) -> dict[str, Tensor]:
        """What masks of sparsity `target` are selected by, by name; self._dense is complete."""
        if self.score == "magnitude":
            return self._dense
        if self.score == "hessian":
            return dict(self.weights)
        if self.score == "fisher":
            found = self._fisher_scores(t, curvature, target)
        else:
            found = {
                name: obs_scores(
                    weight, self._lock.mask_on(name, weight.device), curvature[name], self.dampening, self.pattern
                )
                for name, weight in self.weights.items()
            }
        for name, scores in found.items():
            if not bool(scores.isfinite().all()):
                raise CheckFailed(f"score {self.score}: that of {name} is not finite; lower lr, or train in fp32")
        return found

    def _fisher_scores(self, t: int, curvature: Mapping[str, Tensor], target: float) -> dict[str, Tensor]:
        """The scores; afterwards self._diagonal has the mean squared gradients of all weights in `curvature`."""
        given = [name for name in self.weights if name in curvature]
        if not given:
            raise InputError(f"score fisher: the curvature that step({t}) was given has no weight that is pruned")
        before = next((step for step in range(t - 1, t - self.interval - 1, -1) if self.due(step)), None)
        share = 0.0 if before is None else older_share(self.decay, before + 1, t + 1)
        for name in given:
            pruned = self._lock.mask_on(name, curvature[name].device)
            diagonal = self._on(self._diagonal, name, pruned.device)
            torch.where(pruned, diagonal, (curvature[name] + share * diagonal).clamp_min(0).to(diagonal), out=diagonal)
        means = {name: self._diagonal[name].mean(dtype=torch.float32) for name in given}
        reached = {name: mean for name, mean in means.items() if mean != 0}  # NaN too, which is refused below
        if not reached and target > 0:
            raise CheckFailed(
                f"score fisher: the squared gradients of all weights are 0 at step {t}, wanted some above 0, as while "
                "student and teacher do not differ there is nothing to compare; raise begin, or choose another score"
            )
        mean = torch.stack(list((reached or means).values())).mean()
        diagonals = {name: self._diagonal[name] if name in reached else mean for name in self.weights}
        return {name: fisher_scores(self._dense[name], diagonal) for name, diagonal in diagonals.items()}

    def _remove(self, name: str, pruned: Tensor, curvature: Mapping[str, Tensor]) -> None:
        """Prune one weight to `pruned` and update its other values for that (score obs)."""
        weight, before = self.weights[name], self._lock.mask_on(name, pruned.device)
        weight.copy_(
            obs_update(weight, before, pruned & ~before, curvature[name], self.dampening, self.pattern).to(weight)
        )

    def _refuse_kept(self, name: str, pruned: Tensor, t: int) -> None:
        """Raise InputError if a weight that score hessian should have pruned is not 0."""
        if count := int((self.weights[name][pruned] != 0).count_nonzero()):
            raise InputError(
                f"score hessian: {count} weights too many of {name} are not 0 at step {t}; call prune_layerwise with "
                f"final={self.target(t):.4g} and the pruner's pattern, scope and skip before step({t})"
            )

    def _select(self, scores: Mapping[str, Tensor], sparsity: float) -> Iterator[tuple[str, Tensor]]:
        if self.scope == "global":
            yield from masks.global_masks(scores, sparsity, self.pattern)
        else:
            for name, values in scores.items():
                yield name, masks.magnitude_mask(values, sparsity, self.pattern)

    @staticmethod
    def _on(values: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
        """One of `values`, moved to `device` if the model was moved."""
        if values[name].device != device:
            values[name] = values[name].to(device)
        return values[name]


def check_schedule(begin: int, end: int, stop: int, interval: int) -> None:
    """Raise InputError for steps of `GradualPruner` that are out of order."""
    if begin < 0:
        raise InputError(f"begin is {begin} but must be at least 0")
    if begin >= end:
        raise InputError(f"begin is {begin} but must be below end ({end}); lower begin")
    if stop < end:
        raise InputError(f"stop is {stop} but must be at least end ({end}): masks are selected until stop")
    if interval < 1:
        raise InputError(f"interval is {interval} but must be at least 1 step")


def check_sparsity(initial: float, final: float, pattern: str, scope: str) -> None:
    """Raise InputError for a sparsity, pattern or scope that `GradualPruner` does not have."""
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


def check_score(score: str, dampening: float, decay: float = 0.0) -> None:
    """Raise InputError for a score that `GradualPruner` does not have, or its settings."""
    if score not in SCORES:
        raise InputError(f"score is {score!r}; wanted {', '.join(SCORES[:-1])} or {SCORES[-1]}")
    if not 0 < dampening < float("inf"):
        raise InputError(f"dampening is {dampening} but must be above 0")
    if not 0 <= decay < 1:
        raise InputError(f"decay is {decay} but must be at least 0 and below 1")
