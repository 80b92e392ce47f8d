"""The one Trainer subclass, and the callbacks that also work in a stock `transformers.Trainer`."""

import errno
import itertools
import json
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from pruneofa.errors import InputError, first_line
from pruneofa.formats.files import COMPLETE, sync_tree, write_json
from pruneofa.progress import progress
from pruneofa.train.attention import use_bf16_attention
from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import prunable
from pruneofa.train.prune import GradualPruner
from pruneofa.train.quantize import FakeQuantizer

PRUNER_FILE = "pruner.safetensors"
OBSERVER_FILE = "observers.safetensors"
CLOCK_FILE = "clock.json"


def _encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "student", model)


def _stored_state(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of a checkpoint. Raises InputError when it is damaged."""
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file}: damaged ({first_line(error)}); resume from an older checkpoint") from None


def _verify_end(held: PatternLock | GradualPruner, model: nn.Module, saved: Path | None) -> None:
    """Prove that no zero was lost in the model as it is now, and in `saved`, the checkpoint made of it.

    Raises CheckFailed naming a layer that has revived.
    """
    live = prunable(_encoder(model))
    held.verify_in(live, "the model that training ends with")
    if saved is None or not (file := saved / "model.safetensors").is_file():
        return
    names = {name.replace("_orig_mod.", "") for name in live}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            if name.removeprefix("student.") in names:
                held.verify_in({name: stored.get_tensor(name)}, str(file))


class PruningCallback(TrainerCallback):
    """Gradual magnitude pruning in any `transformers.Trainer`: masks follow `cubic_sparsity`.

    The pruner's state is written into every checkpoint, and found again when training resumes from one
    in the same `output_dir`. Arguments are those of `GradualPruner`.
    """

    def __init__(self, **schedule: Any) -> None:
        self.schedule = schedule
        self.pruner: GradualPruner | None = None
        self._saved: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model; on resume, take masks and dense values from the checkpoint."""
        if self.pruner is not None:
            self.pruner.release()
        self._saved = None
        self.pruner = GradualPruner(_encoder(kwargs["model"]), **self.schedule)
        if state.global_step == 0:
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / PRUNER_FILE
        if not file.exists():
            raise InputError(f"{file}: missing, so pruning cannot resume here; start again or restore the file")
        self.pruner.load_state_dict(_stored_state(file))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Re-select or re-apply the masks after the optimizer step."""
        assert self.pruner is not None
        self.pruner.step(state.global_step - 1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sparsity of the encoder to the logs."""
        if self.pruner is not None and "loss" in kwargs["logs"]:
            kwargs["logs"]["sparsity"] = self.pruner.sparsity()["encoder"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the pruner's state beside the checkpoint's weights."""
        assert self.pruner is not None
        if state.is_world_process_zero:
            self._saved = state.global_step
            file = _checkpoint(args.output_dir, state.global_step, PRUNER_FILE)
            safetensors.torch.save_file(self.pruner.state_dict(), file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prove that the pruned weights are zero in the model that training ends with."""
        assert self.pruner is not None
        saved = _checkpoint(args.output_dir, state.global_step) if self._saved == state.global_step else None
        _verify_end(self.pruner, kwargs["model"], saved)


class LockCallback(TrainerCallback):
    """Keep the sparsity pattern of the model fixed while any `transformers.Trainer` fine-tunes it.

    The pattern goes by the names of the parameters; the parameters are looked up when training begins, since
    a Trainer may make its model anew (`model_init`) after the callback has seen the first one.
    """

    def __init__(self) -> None:
        self.lock: PatternLock | None = None
        self._saved: int | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Capture the pattern before a checkpoint can be loaded over it."""
        if kwargs.get("model") is not None:
            self._capture(_encoder(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lock the parameters that will be trained.

        A model that was made anew brings its own pattern, unless a checkpoint has been loaded over it.
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the pruned weights back to +0.0."""
        assert self.lock is not None
        self.lock.apply()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember the step that was saved last."""
        if state.is_world_process_zero:
            self._saved = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prove that nothing revived in the model that training ends with."""
        assert self.lock is not None
        saved = _checkpoint(args.output_dir, state.global_step) if self._saved == state.global_step else None
        _verify_end(self.lock, kwargs["model"], saved)

    def _capture(self, model: nn.Module) -> None:
        if self.lock is not None:
            self.lock.release()
        self.lock = PatternLock.capture(model)


class QuantizeCallback(TrainerCallback):
    """Let the observers of a `FakeQuantizer` move for a share of the steps, and keep them in every checkpoint."""

    def __init__(self, quantizer: FakeQuantizer, freeze: float) -> None:
        """Freeze the observers after the share `freeze` of the steps; 1 = never."""
        self.quantizer = quantizer
        self.freeze = freeze

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the ranges from the checkpoint that training resumes from."""
        if state.global_step == 0:
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / OBSERVER_FILE
        if not file.exists():
            raise InputError(f"{file}: missing, so quantization cannot resume here; start again or restore the file")
        self.quantizer.load_state_dict(_stored_state(file))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Freeze once the time has come; the first step always observes."""
        self.quantizer.observing = state.global_step < max(1, int(self.freeze * state.max_steps))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the ranges beside the checkpoint's weights."""
        if state.is_world_process_zero:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / OBSERVER_FILE
            safetensors.torch.save_file(self.quantizer.state_dict(), file)


class StageTrainer(Trainer):
    """Trains an objective (a student and, outside its module tree, a teacher) for a number of steps.

    The objective divides every loss by counts taken over the whole optimizer step, all micro-batches and
    ranks, so neither accumulation nor the number of processes changes a loss or a gradient
    (transformers would scale both for some heads).
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: nn.Module,
        *,
        args: TrainingArguments,
        dataset: Any,
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        rate: Callable[[int], float],
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.rate = rate
        self.clock = {"seconds": 0.0, "tokens": 0}
        self._parts: dict[str, torch.Tensor] = {}
        self._steps_in_parts = 0
        super().__init__(
            model=objective,
            args=args,
            train_dataset=dataset,
            data_collator=collate,
            callbacks=list(callbacks),
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A learning-rate multiple that is a pure function of the step."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of one optimizer step and the counts that their losses are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        totals = torch.cat(
            [
                torch.stack([self.model.counts(batch) for batch in batches]).sum(0).double().cpu(),
                torch.tensor([float(sum(int(batch["attention_mask"].sum()) for batch in batches))]).double(),
            ]
        ).to(device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        self.clock["tokens"] += int(totals[-1])
        self._steps_in_parts += 1
        return batches, totals[:-1]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro-batch; DDP averages gradients over ranks, hence the factor."""
        parts = model(inputs, num_items_in_batch)
        for name, value in parts.items():
            if name != "loss":
                self._parts[name] = self._parts.get(name, 0) + value.detach().double()
        return parts["loss"] * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, averaged over the steps since the last log."""
        if "loss" in logs and self._steps_in_parts:
            names = sorted(self._parts)
            values = torch.stack([self._parts[name] for name in names]) if names else torch.zeros(0)
            if self.args.world_size > 1 and names:
                torch.distributed.all_reduce(values)
            logs.update({name: float(v) / self._steps_in_parts for name, v in zip(names, values, strict=True)})
            self._parts.clear()
            self._steps_in_parts = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.model.student.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = safetensors.torch.load_file(Path(resume_from_checkpoint) / "model.safetensors")
        result = self.model.student.load_state_dict(state, strict=False)
        # Tied weights are stored once; everything else must be there.
        tied = set(getattr(self.model.student, "all_tied_weights_keys", {}) or {})
        wrong = [name for name in result.missing_keys if name not in tied] + list(result.unexpected_keys)
        if wrong:
            raise InputError(f"{resume_from_checkpoint}: does not fit the model ({wrong[0]}); delete it to start again")


class _Bookkeeping(TrainerCallback):
    """Progress bar, event log, elapsed time, Ctrl-C, and the marker that makes a checkpoint count.

    It comes last among the callbacks, so that everything a checkpoint needs is in it before the marker.
    """

    def __init__(self, stage: str, emit: Callable[[dict[str, Any]], None]) -> None:
        self.stage = stage
        self.emit = emit
        self.trainer: StageTrainer
        self.interrupted = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.trainer.clock = json.loads(_checkpoint(args.output_dir, state.global_step, CLOCK_FILE).read_text())
        self.since = time.monotonic() - self.trainer.clock["seconds"]
        self.stack = ExitStack()
        if state.is_world_process_zero:
            self.advance = self.stack.enter_context(progress(self.stage, state.max_steps, completed=state.global_step))
            self.emit({"event": "start", "stage": self.stage, "step": state.global_step, "steps": state.max_steps})
        self.handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self.handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.advance()
        if args.world_size > 1:  # ranks that stop at different steps would wait for each other for ever
            flag = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        loss = logs["loss"]
        if loss != loss or abs(loss) == float("inf"):
            raise InputError(
                f"{self.stage}: the loss is {loss} at step {state.global_step}; lower its lr, or use precision: fp32"
            )
        if state.is_world_process_zero:
            self.advance(0, f"loss {loss:.4f}")
            self.emit(
                {
                    "event": "log",
                    "stage": self.stage,
                    "step": state.global_step,
                    "lr": logs.get("learning_rate"),
                    **{k: v for k, v in logs.items() if k not in ("learning_rate", "epoch", "step")},
                }
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            self.trainer.clock["seconds"] = time.monotonic() - self.since
            write_json(_checkpoint(args.output_dir, state.global_step, CLOCK_FILE), self.trainer.clock)
            folder = _checkpoint(args.output_dir, state.global_step)
            sync_tree(folder)
            (folder / COMPLETE).touch()
            sync_tree(folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.clock["seconds"] = time.monotonic() - self.since
        self.close()

    def close(self) -> None:
        """End the bar and give Ctrl-C back, also after an error."""
        if hasattr(self, "stack"):
            self.stack.close()
            signal.signal(signal.SIGINT, self.handler)


def _checkpoint(output_dir: str | None, step: int, file: str = "") -> Path:
    return Path(str(output_dir)) / f"checkpoint-{step}" / file


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).exists()]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _remove_half_written(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def _remove_damaged(folder: Path) -> None:
    """Delete complete checkpoints that cannot be read, newest first, up to one that can; each is named on stderr."""
    while checkpoint := last_checkpoint(folder):
        fault = _fault(checkpoint)
        if fault is None:
            return
        shutil.rmtree(checkpoint)
        older = last_checkpoint(folder)
        then = f"trying {older.name}" if older else "training starts from the beginning"
        sys.stderr.write(f"pruneofa: warning: {checkpoint}: damaged ({fault}); it is deleted, {then}\n")


def _fault(checkpoint: Path) -> str | None:
    """What keeps training from resuming here, "file: reason", or None after every file has been read."""
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", CLOCK_FILE):
        if not (checkpoint / name).is_file():
            return f"{name}: missing"
    for file in sorted(checkpoint.iterdir()):
        try:
            _read_through(file)
        except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            if "allocate" in str(error):  # short of memory here: nothing is known of the file
                raise
            return f"{file.name}: {first_line(error)}"
        except OSError as error:
            if error.errno != errno.EINVAL:  # torch looks for the archive's directory before the start of a short file
                raise
            return f"{file.name}: cut short"
    return None


def _read_through(file: Path) -> None:
    """Read a file of a checkpoint in the way resuming does, one tensor at a time where its format allows."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                stored.get_tensor(name)
    elif file.suffix in (".pt", ".pth"):
        with safe_globals():
            torch.load(file, map_location="cpu", weights_only=True)
    elif file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))


def train(
    objective: nn.Module,
    *,
    stage: str,
    work: Path,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    steps: int,
    batch: int,
    lr: float,
    rate: Callable[[int], float],
    emit: Callable[[dict[str, Any]], None],
    micro_batch: int | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    precision: str = "bf16",
    checkpoint_activations: bool = False,
    save_steps: int | None = None,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train `objective.student` in place, resuming from the newest complete checkpoint in `work`.

    A checkpoint that cannot be read is named on stderr and deleted, and the one before it is used.
    Returns {"seconds", "tokens"} over all attempts. `rate(t)` multiplies `lr` in optimizer step t + 1.
    Raises InputError when `batch` cannot be divided among micro-batches and processes, KeyboardInterrupt
    after a Ctrl-C has been answered with a checkpoint.
    """
    micro, accumulation = split_batch(batch, micro_batch)
    cuda = torch.cuda.is_available()
    if precision == "bf16":
        _prepare_for_bf16(objective, cuda=cuda)
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=lr,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        bf16=precision == "bf16",
        use_cpu=not cuda,
        seed=seed,
        logging_steps=max(1, min(50, steps // 100)),
        logging_nan_inf_filter=False,
        save_steps=save_steps or max(1, steps // 20),
        save_total_limit=2,
        train_sampling_strategy="sequential",
        average_tokens_across_devices=False,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=4 if cuda else 0,
        dataloader_pin_memory=cuda,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    if checkpoint_activations:
        objective.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    books = _Bookkeeping(stage, emit)
    trainer = StageTrainer(
        objective, args=args, dataset=dataset, collate=collate, rate=rate, callbacks=[*callbacks, books]
    )
    _silence(trainer)
    books.trainer = trainer
    if processes().is_main_process:
        _remove_half_written(work)
        _remove_damaged(work)
    processes().wait_for_everyone()
    resume = last_checkpoint(work)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        books.close()
    if books.interrupted:
        raise KeyboardInterrupt
    return dict(trainer.clock)


def _prepare_for_bf16(objective: nn.Module, *, cuda: bool) -> None:
    if not cuda:
        for model in (objective.student, objective.teacher):
            if model is not None:
                use_bf16_attention(model)
    if objective.teacher is not None:
        # Autocast rounds weights to bfloat16 in every step; those that never change can be rounded once.
        for module in objective.teacher.base_model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def _silence(trainer: Trainer) -> None:
    """Take away the Trainer's own printing of logs: progress and log.jsonl say it once."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def split_batch(batch: int, micro_batch: int | None) -> tuple[int, int]:
    """(examples per forward pass, accumulation steps) for `batch` examples per step over all processes."""
    world = processes().num_processes
    micro = min(micro_batch or batch // world, batch // world)
    if micro == 0 or batch % (micro * world):
        raise InputError(
            f"batch is {batch}, which {world} process(es) x micro_batch {micro_batch} do not divide; "
            "choose a batch that is a multiple of both"
        )
    return micro, batch // (micro * world)


def processes() -> PartialState:
    """The processes that train together: one, or those that torchrun started."""
    # Without `cpu`, accelerate takes the ranks of a machine that has no GPU for processes on their own.
    return PartialState(cpu=not torch.cuda.is_available())


def batches(dataset: Any, collate: Callable[[list[Any]], dict[str, torch.Tensor]], size: int) -> Iterator[Any]:
    """Collated batches of a dataset, in its order."""
    items = iter(dataset) if isinstance(dataset, IterableDataset) else (dataset[i] for i in range(len(dataset)))
    while taken := list(itertools.islice(items, size)):
        yield collate(taken)
