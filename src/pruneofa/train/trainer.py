"""Training of one stage: the Trainer subclass, progress bar, checkpoints, and `train`, which resumes."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pruneofa.errors import InputError
from pruneofa.formats.files import read_json, write_json
from pruneofa.progress import progress
from pruneofa.train.attention import use_bf16_attention
from pruneofa.train.checkpoints import (
    CLOCK_FILE,
    checkpoint_path,
    last_checkpoint,
    mark_complete,
    remove_damaged,
    remove_incomplete,
)
from pruneofa.train.device import processes, split_batch


class StageTrainer(Trainer):
    """Trains an objective (a student, and a teacher outside the module tree) for a number of steps.

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
        # Tied weights are stored once; all other weights must exist.
        tied = set(getattr(self.model.student, "all_tied_weights_keys", {}) or {})
        wrong = [name for name in result.missing_keys if name not in tied] + list(result.unexpected_keys)
        if wrong:
            raise InputError(f"{resume_from_checkpoint}: does not fit the model ({wrong[0]}); delete it to start again")


class _StageCallback(TrainerCallback):
    """Progress bar, event log, elapsed time, Ctrl-C, and the file that marks a checkpoint as complete.

    It is the last of the callbacks, so that the marker is written after everything else in the checkpoint.
    """

    def __init__(self, stage: str, emit: Callable[[dict[str, Any]], None]) -> None:
        self.stage = stage
        self.emit = emit
        self.trainer: StageTrainer
        self.interrupted = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.trainer.clock = read_json(checkpoint_path(args.output_dir, state.global_step, CLOCK_FILE))
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
        if args.world_size > 1:  # ranks that stop at different steps would deadlock
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
                f"{self.stage}: the loss is {loss} at step {state.global_step}; lower lr, or use precision: fp32"
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
            write_json(checkpoint_path(args.output_dir, state.global_step, CLOCK_FILE), self.trainer.clock)
            mark_complete(checkpoint_path(args.output_dir, state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.clock["seconds"] = time.monotonic() - self.since
        self.close()

    def close(self) -> None:
        """Close the progress bar and restore the handler of Ctrl-C; also called after an error."""
        if hasattr(self, "stack"):
            stop = KeyboardInterrupt() if self.interrupted else None
            with suppress(KeyboardInterrupt):  # the bar must not say that it is done
                self.stack.__exit__(stop and type(stop), stop, None)
            signal.signal(signal.SIGINT, self.handler)


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

    A checkpoint that cannot be read is reported on stderr and deleted, and the one before it is used.
    Returns {"seconds", "tokens"} over all attempts. `rate(t)` multiplies `lr` in optimizer step t + 1.
    Raises InputError when `batch` cannot be divided among micro-batches and processes, or the model cannot compute
    activations again, and KeyboardInterrupt after Ctrl-C, once a checkpoint has been written.
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
        save_total_limit=None,  # the Trainer would delete the oldest by time, before the new one is complete
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
        if not objective.student.supports_gradient_checkpointing:
            raise InputError(
                f"checkpoint_activations is true, which transformers' {type(objective.student).__name__} does not "
                "support; set it to false, and a smaller micro_batch if memory is short"
            )
        objective.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bookkeeping = _StageCallback(stage, emit)
    trainer = StageTrainer(
        objective, args=args, dataset=dataset, collate=collate, rate=rate, callbacks=[*callbacks, bookkeeping]
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
        bookkeeping.close()
    if bookkeeping.interrupted:
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
    """Remove the Trainer's own printing of logs, which the progress bar and log.jsonl already show."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def batches(dataset: Any, collate: Callable[[list[Any]], dict[str, torch.Tensor]], size: int) -> Iterator[Any]:
    """Collated batches of a dataset, in its order."""
    items = iter(dataset) if isinstance(dataset, IterableDataset) else (dataset[i] for i in range(len(dataset)))
    while taken := list(itertools.islice(items, size)):
        yield collate(taken)
