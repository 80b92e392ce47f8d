"""Training of one stage: the Trainer subclass, progress bar, checkpoints, and `train`, which resumes."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.distributed
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pruneofa.errors import Diverged, InputError
from pruneofa.formats.files import read_json, write_json
from pruneofa.progress import notice, progress
from pruneofa.recipe.fields import SAVE_MINUTES
from pruneofa.train.checkpoints import (
    CLOCK_FILE,
    MODEL,
    BackgroundWriter,
    Snapshot,
    checkpoint_path,
    last_checkpoint,
    remove_damaged,
    remove_incomplete,
)
from pruneofa.train.device import prepare_models, processes, split_batch, trainer_options
from pruneofa.train.micro_batches import Batch, StepCollate, split
from pruneofa.train.models import all_finite, recompute_activations
from pruneofa.train.objective import Objective
from pruneofa.train.sparse_linear import compute_densely

OPTIONS: dict[str, Any] = {  # of the Trainer, in every stage
    "logging_nan_inf_filter": False,
    "save_total_limit": None,  # the Trainer would delete the oldest by time, before the new one is complete
    "train_sampling_strategy": "sequential",
    "average_tokens_across_devices": False,
    "remove_unused_columns": False,
    "dataloader_drop_last": True,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
}
AGREEMENT_STEPS = 10  # several processes agree on stops and checkpoints every so many steps: asking makes a GPU wait


class StageTrainer(Trainer):
    """Trains an objective (a student, and a teacher outside the module tree) for a number of steps.

    The objective divides every loss by counts taken over the whole optimizer step, all micro-batches and
    ranks, so neither accumulation nor the number of processes changes a loss or a gradient
    (transformers would scale both for some heads).
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: Objective,
        *,
        stage: str,
        args: TrainingArguments,
        dataset: Any,
        collate: StepCollate,
        rate: Callable[[int], float],
        callbacks: Sequence[TrainerCallback],
        writer: BackgroundWriter,
    ) -> None:
        self.student = objective.student
        self.rate = rate
        self.writer = writer
        self.stage = stage
        self.micro_batch = self.largest_micro_batch = collate.micro_batch
        self.clock = {"seconds": 0.0, "tokens": 0}
        self.snapshot: Snapshot | None = None
        self._tokens = torch.zeros((), dtype=torch.float64)
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
            made = cast(torch.optim.Optimizer, optimizer or self.optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(made, self.rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of one optimizer step and the counts that their losses are divided by."""
        steps, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not steps:
            return steps, None
        totals = steps[0]["counts"].to(device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        self._tokens = self._tokens.to(device) + totals[-1]
        self._steps_in_parts += 1
        return steps, totals[:-1]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of one optimizer step, over its micro-batches; returns its loss.

        If there is no memory for a micro-batch, the step is begun again with half of it, and so are all later ones.

        Raises InputError when there is no memory for one example, or with several processes, of which the others wait.
        """
        model.train()
        batches = inputs["batches"]
        while True:
            batches = [part for batch in batches for part in split(batch, self.micro_batch)]
            try:
                loss, parts = self._accumulate(model, batches, num_items_in_batch)
                break
            except torch.OutOfMemoryError:
                rows = max(len(batch["input_ids"]) for batch in batches)
                if rows == 1 or self.args.world_size > 1:
                    raise InputError(self._out_of_memory(rows)) from None
            # Outside of the handler, whose traceback keeps the activations.
            self.micro_batch = -(-rows // 2)
            model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            notice(
                f"{self.stage}: out of memory with {rows} examples per forward pass; continuing with "
                f"{self.micro_batch}, the batch per optimizer step stays the same"
            )
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value
        return loss

    def _accumulate(
        self, model: nn.Module, batches: list[Batch], counts: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of an optimizer step and its parts, with gradients added up; DDP averages them over ranks."""
        total: Any = 0
        parts: dict[str, Any] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    losses = model(batch, counts)
                self.accelerator.backward(losses["loss"] * self.args.world_size)
            total = total + losses["loss"].detach() * self.args.world_size
            for name in losses.keys() - {"loss"}:
                parts[name] = parts.get(name, 0) + losses[name].detach().double()
        return total, parts

    def _out_of_memory(self, rows: int) -> str:
        if rows == 1:
            return f"{self.stage}: out of memory with one example per forward pass; lower max_length"
        return (
            f"{self.stage}: out of memory with {rows} examples per forward pass and process; lower micro_batch "
            "(of teacher and prune) or max_length, or use more processes"
        )

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

    def read_clock(self, seconds: float) -> dict[str, Any]:
        """{"seconds", "tokens"} so far, over all attempts."""
        self.clock = {"seconds": seconds, "tokens": int(self._tokens)}
        return self.clock

    def progress_state(self, seconds: float) -> dict[str, Any]:
        """`read_clock`, and the "micro_batch" if memory ran out with a larger one: what `resume` takes."""
        lowered = self.micro_batch < self.largest_micro_batch
        return self.read_clock(seconds) | ({"micro_batch": self.micro_batch} if lowered else {})

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from the `progress_state` of an earlier attempt."""
        self.clock = {name: state[name] for name in ("seconds", "tokens")}
        self._tokens = torch.tensor(float(state["tokens"]), dtype=torch.float64)
        if state.get("micro_batch", self.micro_batch) < self.micro_batch:
            self.micro_batch = state["micro_batch"]
            notice(
                f"{self.stage}: resumes with {self.micro_batch} examples per forward pass, since memory ran out with "
                "more"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Copy the state of training to memory, and write what is small: it differs from process to process."""
        folder = checkpoint_path(self.args.output_dir, self.state.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.student.config.save_pretrained(folder)
            self.state.save_to_json(str(folder / "trainer_state.json"))
            self.writer.wait()  # memory need not hold two snapshots
            self.snapshot = Snapshot.of(self.student, self.optimizer, self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = safetensors.torch.load_file(Path(resume_from_checkpoint) / MODEL)
        result = self.student.load_state_dict(state, strict=False)
        # Tied weights are stored once; all other weights must exist.
        tied = set(getattr(self.student, "all_tied_weights_keys", {}) or {})
        wrong = [name for name in result.missing_keys if name not in tied] + list(result.unexpected_keys)
        if wrong:
            raise InputError(f"{resume_from_checkpoint}: does not fit the model ({wrong[0]}); delete it to start again")


class _StageCallback(TrainerCallback):
    """Progress bar, event log, elapsed time, Ctrl-C, and the file that marks a checkpoint as complete.

    It is the last of the callbacks, so that the marker is written after everything else in the checkpoint.
    """

    def __init__(self, stage: str, emit: Callable[[dict[str, Any]], None], save_seconds: float) -> None:
        self.stage = stage
        self.emit = emit
        self.save_seconds = save_seconds
        self.trainer: StageTrainer
        self.interrupted = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.trainer.resume(read_json(checkpoint_path(args.output_dir, state.global_step, CLOCK_FILE)))
        self.saved = time.monotonic()
        self.since = self.saved - self.trainer.clock["seconds"]
        self.stack, self.handler = ExitStack(), signal.signal(signal.SIGINT, self._interrupt)
        if state.is_world_process_zero:
            self.advance = self.stack.enter_context(progress(self.stage, state.max_steps, completed=state.global_step))
            self.emit({"event": "start", "stage": self.stage, "step": state.global_step, "steps": state.max_steps})

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self.handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.advance()
        if state.global_step == state.max_steps and not all_finite(self.trainer.student):  # the last log may be before
            raise self._diverged(f"weights are NaN or infinite after step {state.global_step}")
        self.trainer.writer.check()
        due = time.monotonic() - self.saved >= self.save_seconds
        if args.world_size > 1:  # ranks that stop, or save, at different steps would deadlock
            if state.global_step % AGREEMENT_STEPS and state.global_step < state.max_steps:
                return
            flags = torch.tensor([float(self.interrupted), float(due)], device=args.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            self.interrupted, due = (bool(flag) for flag in flags)
        if self.interrupted or due:
            control.should_save = True
        if self.interrupted:
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        loss = logs["loss"]
        if loss != loss or abs(loss) == float("inf"):
            raise self._diverged(f"the loss is {loss} at step {state.global_step}")
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

    def _diverged(self, what: str) -> Diverged:
        clock = self.trainer.read_clock(time.monotonic() - self.since)
        return Diverged(f"{self.stage}: {what}; lower lr, or use precision: fp32", clock)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = checkpoint_path(args.output_dir, state.global_step)
            write_json(folder / CLOCK_FILE, self.trainer.progress_state(time.monotonic() - self.since))
            assert self.trainer.snapshot is not None
            self.trainer.writer.start(partial(self.trainer.snapshot.write, folder))
            self.trainer.snapshot = None
        self.saved = time.monotonic()
        if control.should_training_stop:  # the checks at the end of training read the checkpoint
            self.trainer.writer.wait()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.read_clock(time.monotonic() - self.since)
        self.close()

    def close(self) -> None:
        """Close the progress bar and restore the handler of Ctrl-C; also called after an error."""
        if hasattr(self, "stack"):
            stop = (KeyboardInterrupt, KeyboardInterrupt(), None) if self.interrupted else (None, None, None)
            with suppress(KeyboardInterrupt):  # the bar must not say that it is done
                self.stack.__exit__(*stop)
            signal.signal(signal.SIGINT, self.handler)


def train(
    objective: Objective,
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
    save_minutes: float = SAVE_MINUTES,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train `objective.student` in place, resuming from the newest complete checkpoint in `work`.

    Checkpoints are written every `save_steps` steps, or every `save_minutes` minutes where that is None, and at the
    end; another thread writes them. A checkpoint that cannot be read is reported on stderr and deleted, and the one
    before it is used.
    Returns {"seconds", "tokens"} over all attempts. `rate(t)` multiplies `lr` in optimizer step t + 1.
    Raises InputError when `batch` cannot be divided among micro-batches and processes, or the model cannot compute
    activations again, Diverged for NaN and infinity, and KeyboardInterrupt after Ctrl-C, with a checkpoint written.
    """
    micro, parts = split_batch(batch, micro_batch)
    prepare_models(objective.student, objective.teacher, precision)
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=micro * parts,  # StepCollate divides it
        learning_rate=lr,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        logging_steps=max(1, min(50, steps // 100)),
        save_steps=save_steps or steps,  # the Trainer saves at the end too
        **OPTIONS,
        **trainer_options(precision),
    )
    if args.n_gpu > 1:  # the Trainer would divide the batches, and what is counted in them, with DataParallel
        notice(f"{stage}: training on one of {args.n_gpu} GPUs; torchrun --nproc-per-node {args.n_gpu} uses all")
        args._n_gpu = 1
    if checkpoint_activations:
        recompute_activations(objective.student)
    writer = BackgroundWriter()
    bookkeeping = _StageCallback(stage, emit, float("inf") if save_steps else 60 * save_minutes)
    trainer = StageTrainer(
        objective,
        stage=stage,
        args=args,
        dataset=dataset,
        collate=StepCollate(collate, objective.counts, micro),
        rate=rate,
        callbacks=[*callbacks, bookkeeping],
        writer=writer,
    )
    _silence(trainer)
    bookkeeping.trainer = trainer
    if processes().is_main_process:
        remove_incomplete(work)
        remove_damaged(work)
    processes().wait_for_everyone()
    resume = last_checkpoint(work)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        compute_densely(objective.modules())  # the LockCallback has done so, if there was no error
        writer.close()
        bookkeeping.close()
    if bookkeeping.interrupted:
        raise KeyboardInterrupt
    return dict(trainer.clock)


def _silence(trainer: Trainer) -> None:
    """Remove the Trainer's own printing of logs, which the progress bar and log.jsonl already show."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
