"""Callbacks that prune, lock and quantize in any `transformers.Trainer`."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pruneofa.errors import InputError
from pruneofa.train.checkpoints import checkpoint_path, read_state
from pruneofa.train.curvature import moment_decay, second_moments
from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import prunable, refuse_string
from pruneofa.train.prune import GradualPruner, check_schedule, check_score, check_sparsity
from pruneofa.train.quantize import FakeQuantizer
from pruneofa.train.sparse_linear import can_skip, compute_densely, note_zeroed, skip_locked_zeros

PRUNER_FILE = "pruner.safetensors"
OBSERVER_FILE = "observers.safetensors"

Blocks = Callable[[Mapping[str, nn.Parameter], int], Mapping[str, Tensor]]
Fit = Callable[[float, int], None]


def _encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "student", model)


def _verify_end(mask_state: PatternLock | GradualPruner, model: nn.Module, saved: Path | None) -> None:
    """Check that every pruned weight is zero in `model` as it is now, and in its checkpoint `saved`.

    Raises CheckFailed naming a layer with a pruned weight that is not zero.
    """
    live = prunable(_encoder(model))
    mask_state.verify_in(live, "the model that training ends with")
    names = [f".{name.replace('_orig_mod.', '')}" for name in live]
    for file in sorted(saved.rglob("model*.safetensors")) if saved is not None else ():
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                # Wrappers such as sentence-transformers save the parameters without their own name prefix.
                if any(full.endswith(f".{name.removeprefix('student.')}") for full in names):
                    mask_state.verify_in({name: stored.get_tensor(name)}, str(file))


class PruningCallback(TrainerCallback):
    """Gradual pruning in any `transformers.Trainer`: masks follow `cubic_sparsity`.

    The pruner's state is written into every checkpoint and restored when training resumes from one in the same
    `output_dir`. Score fisher reads the second moments of the Trainer's Adam.
    """

    def __init__(
        self,
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
        blocks: Blocks | None = None,
        fit: Fit | None = None,
    ) -> None:
        """The arguments of `GradualPruner`; `blocks`, which score obs needs, and `fit`, which score hessian does.

        Both are called where new masks are selected. `blocks` gets the weights by name and t, and gives the blocks of
        the curvature. `fit` gets the sparsity that is due and t, and prunes the model that is trained to it, as
        `layerwise.prune_layerwise` does. Raises InputError for a bad schedule, sparsity, pattern, scope or score, and
        for a score without its function; what depends on the model is checked when training begins.
        """
        check_schedule(begin, end, stop, interval)
        check_sparsity(initial, final, pattern, scope)
        check_score(score, dampening)
        refuse_string(skip)
        if score == "obs" and blocks is None:
            raise InputError("score obs: needs a function that computes the blocks of the curvature; pass blocks=")
        if score == "hessian" and fit is None:
            raise InputError("score hessian: needs a function that prunes the model layer by layer; pass fit=")
        self.skip, self.score, self.blocks, self.fit = tuple(skip), score, blocks, fit
        self._attach = partial(
            GradualPruner,
            final=final,
            begin=begin,
            end=end,
            stop=stop,
            interval=interval,
            initial=initial,
            pattern=pattern,
            scope=scope,
            skip=self.skip,
            score=score,
            dampening=dampening,
        )
        self.pruner: GradualPruner | None = None
        self._saved: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model; on resume, load masks and dense values from the checkpoint.

        Raises InputError as `GradualPruner` does, and for a checkpoint without the pruner's state. Warns of a training
        that ends before the pruning does.
        """
        if self.pruner is not None:
            self.pruner.release()
        self._saved = None
        model = _encoder(kwargs["model"])
        fisher = self.score == "fisher"
        decay = moment_decay(kwargs["optimizer"], prunable(model, self.skip)) if fisher else 0.0
        self.pruner = self._attach(model, decay=decay)
        if (last := state.max_steps - 1) < self.pruner.end:
            warnings.warn(
                f"pruning reaches its final sparsity at step {self.pruner.end}, but training ends after step {last}: "
                "the model will be less sparse; lower end, or continue from the last checkpoint with more steps",
                stacklevel=2,
            )
        if state.global_step == 0:
            return
        file = checkpoint_path(args.output_dir, state.global_step, PRUNER_FILE)
        if not file.exists():
            raise InputError(f"{file}: missing, but resuming pruning needs it; start again or restore the file")
        self.pruner.load_state_dict(read_state(file))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Re-select or re-apply the masks after the optimizer step."""
        assert self.pruner is not None
        t, curvature = state.global_step - 1, None
        if self.pruner.due(t) and self.pruner.score == "fisher":
            curvature = second_moments(kwargs["optimizer"], self.pruner.weights)
        elif self.pruner.due(t) and self.pruner.score == "obs":
            assert self.blocks is not None  # checked when the callback was made
            curvature = self.blocks(self.pruner.weights, t)
        elif self.pruner.due(t) and self.pruner.score == "hessian":
            assert self.fit is not None
            self.fit(self.pruner.target(t), t)
        self.pruner.step(t, curvature)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sparsity of the encoder to the logs."""
        if self.pruner is not None and "loss" in kwargs["logs"]:
            kwargs["logs"]["sparsity"] = self.pruner.sparsity()["encoder"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the pruner's state beside the checkpoint's weights."""
        assert self.pruner is not None
        if state.is_world_process_zero:
            self._saved = state.global_step
            file = checkpoint_path(args.output_dir, state.global_step, PRUNER_FILE)
            safetensors.torch.save_file(self.pruner.state_dict(), file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the pruned weights are zero in the model that training ends with, and let go of its gradients."""
        assert self.pruner is not None
        saved = checkpoint_path(args.output_dir, state.global_step) if self._saved == state.global_step else None
        _verify_end(self.pruner, kwargs["model"], saved)
        self.pruner.release()


class LockCallback(TrainerCallback):
    """Keep the sparsity pattern of the model fixed while any `transformers.Trainer` fine-tunes it.

    The pattern is stored by parameter name; the parameters are looked up when training begins, since a Trainer
    may create another model (`model_init`) after the callback has seen the first one.

    In training of one process on a CPU, layers with many zeros skip them where they compute in float32 (see
    `sparse_linear`), unless `skip_zeros` is false; results change by rounding only. They become nn.Linear again
    when training ends; after an interruption they stay SparseLinear, which computes densely once a weight is changed.
    """

    def __init__(self, *, skip_zeros: bool = True) -> None:
        self.skip_zeros = skip_zeros
        self._sparse: list[nn.Module] = []  # the layers that do
        self.lock: PatternLock | None = None
        self._saved: int | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Capture the pattern before a checkpoint can be loaded into the model."""
        if kwargs.get("model") is not None:
            self._capture(_encoder(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lock the parameters that will be trained.

        A new model has its own pattern, unless a checkpoint has been loaded into it.
        """
        self._saved = None
        model = _encoder(kwargs["model"])
        if self.lock is None:
            self._capture(model)
        elif not self.lock.holds(model):
            if state.global_step:
                self.lock = self.lock.on(model)
            else:
                self._capture(model)
        # Of an earlier training that was interrupted, perhaps with another callback.
        compute_densely([*self._sparse, *model.modules()])
        self._sparse = []
        reduced, compiled = args.bf16 or args.fp16, args.torch_compile
        possible = can_skip(processes=args.world_size, reduced=reduced, compiled=compiled)
        if self.skip_zeros and possible and self.lock is not None:
            self._sparse = skip_locked_zeros(model, self.lock.weights, self.lock.pruned)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the pruned weights back to +0.0."""
        assert self.lock is not None
        self.lock.apply()
        note_zeroed(self._sparse)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember the step that was saved last."""
        if state.is_world_process_zero:
            self._saved = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that every pruned weight is zero in the model that training ends with."""
        compute_densely(self._sparse)
        self._sparse = []
        assert self.lock is not None
        saved = checkpoint_path(args.output_dir, state.global_step) if self._saved == state.global_step else None
        _verify_end(self.lock, kwargs["model"], saved)

    def _capture(self, model: nn.Module) -> None:
        if self.lock is not None:
            self.lock.release()
        self.lock = PatternLock.capture(model)


class QuantizeCallback(TrainerCallback):
    """Update the observers of a `FakeQuantizer` for a share of the steps, and save them in every checkpoint."""

    def __init__(self, quantizer: FakeQuantizer, freeze: float) -> None:
        """Freeze the observers after the share `freeze` of the steps; 1 = never."""
        self.quantizer = quantizer
        self.freeze = freeze

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """On resume, load the ranges from the checkpoint."""
        if state.global_step == 0:
            return
        file = checkpoint_path(args.output_dir, state.global_step, OBSERVER_FILE)
        if not file.exists():
            raise InputError(f"{file}: missing, but resuming quantization needs it; start again or restore the file")
        self.quantizer.load_state_dict(read_state(file))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Freeze the observers after their share of the steps; they always observe the first step."""
        self.quantizer.observing = state.global_step < max(1, int(self.freeze * state.max_steps))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the ranges beside the checkpoint's weights."""
        if state.is_world_process_zero:
            file = checkpoint_path(args.output_dir, state.global_step, OBSERVER_FILE)
            safetensors.torch.save_file(self.quantizer.state_dict(), file)
