"""What a run will cost: steps, tokens, and minutes from a few steps timed on this machine."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneofa import families
from pruneofa.data import tasks as task_data
from pruneofa.progress import progress
from pruneofa.recipe import Control, Corpus, Prune, Recipe, Task, Teacher
from pruneofa.run.plan import Run, Stage, check_folder
from pruneofa.run.stages import (
    Text,
    numerics,
    qat_dataset,
    student_objective,
    teacher_objective,
    transfer_objective,
)
from pruneofa.train.models import load_for_pretraining, load_for_task, load_tokenizer
from pruneofa.train.quantize import FakeQuantizer
from pruneofa.train.trainer import last_checkpoint, split_batch

PROBE_STEPS = 5
PROBE_TOKENS = 4096  # a probe never runs a larger batch than this: the rest is multiplied


def estimate(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """One row per stage: {"stage", "status", "steps", "tokens", "minutes"}.

    `tokens` counts positions of full-length examples for text, real tokens for tasks. `status` is done
    (skipped), changed (finished or begun with other settings: refused without --redo), resume or run; the
    minutes of resume are those that are left. Nothing is written, so the corpus is not tokenized.

    Raises InputError for what a run would refuse, changed stages apart.
    """
    check_folder(recipe, folder)
    this = _DryRun(recipe, folder)
    stages = this.stages()
    this.check(stages, redo=True)
    rows = []
    with progress("timing 5 steps of each stage", len(stages)) as advance:
        timed: dict[Any, float] = {}
        for stage in stages:
            rows.append(_row(this, stage, timed))
            advance()
    total = sum(row["minutes"] for row in rows)
    return [*rows, {"stage": "total", "status": "", "steps": None, "tokens": None, "minutes": round(total, 1)}]


class _DryRun(Run):
    """A run that checks everything but the content of its corpus: tokenizing takes hours and fills the cache."""

    def text(self) -> Text:
        """The corpus unread."""
        assert self.recipe.corpus is not None
        return Text(self.recipe.corpus, None, load_tokenizer(self.recipe.model))


def _row(this: Run, stage: Stage, timed: dict[Any, float]) -> dict[str, Any]:
    kind, steps, tokens = _size(this, stage)
    status, done = stage.status, 0
    mark = this.work / stage.name / "fingerprint"
    if status == "run" and mark.exists():
        begun_otherwise = mark.read_text() != stage.fingerprint
        done = 0 if begun_otherwise else _steps_done(this, this.work / stage.name)
        status = "changed" if begun_otherwise else "resume" if done else "run"
    row = {"stage": stage.name, "status": status, "steps": steps, "tokens": tokens, "minutes": 0.0}
    if status != "done" and steps:
        if kind not in timed:
            timed[kind] = _seconds_per_token(this, stage, tokens / steps)
        left = 1 - done / steps if status == "resume" else 1
        row["minutes"] = round(timed[kind] * tokens / 60 * left, 1)
    return row


def _steps_done(this: Run, work: Path) -> int:
    """Optimizer steps that a run would not repeat, over all learning rates of a control."""
    done = 0
    for folder in [work, *sorted(work.glob("lr-*"))]:
        if (folder / "done.json").exists():
            assert this.recipe.prune is not None
            done += this.recipe.prune.steps
        elif checkpoint := last_checkpoint(folder):
            done += int(checkpoint.name.rpartition("-")[2])
    return done


def _size(this: Run, stage: Stage) -> tuple[Any, int, int]:
    """(what shares a timing, optimizer steps, tokens) of a stage."""
    recipe = this.recipe
    if stage.name in ("teacher", "prune", "control"):
        settings = recipe.teacher if stage.name == "teacher" else recipe.prune
        assert settings is not None and recipe.corpus is not None
        control = recipe.control if stage.name == "control" and isinstance(recipe.control, Control) else None
        tries = len(control.lr or []) if control else 1
        kind = "teacher" if stage.name == "teacher" else "prune"
        return kind, settings.steps * tries, settings.steps * tries * settings.batch * recipe.corpus.max_length
    _, name, seed, variant = stage.name.split("/")
    spec = recipe.tasks[name].resolved(name)
    if variant == "ptq" or (variant == "teacher" and spec.teacher is not None):
        return None, 0, 0
    data = this.task(name).train
    if variant == "quantize":
        _, steps = qat_dataset(spec, this.task(name), int(seed.removeprefix("seed-")))
        assert data is not None and spec.batch is not None
        return (name, variant), steps, int(sum(data.lengths) / len(data) * steps * spec.batch)
    epochs = spec.dense_epochs if variant == "teacher" else spec.epochs
    assert data is not None and epochs is not None and spec.batch is not None
    kind = (name, "dense" if variant == "teacher" else "transfer")
    positions = data.train_dataset(spec.batch, int(seed.removeprefix("seed-")), epochs)
    return kind, len(positions) // spec.batch, int(sum(data.lengths)) * epochs


def _seconds_per_token(this: Run, stage: Stage, tokens_per_step: float) -> float:
    recipe = this.recipe
    if stage.name in ("teacher", "prune", "control"):
        settings = recipe.teacher if stage.name == "teacher" else recipe.prune
        assert settings is not None and recipe.corpus is not None
        objective, batch = _pretraining_probe(recipe, settings, recipe.corpus)
    else:
        _, name, _, variant = stage.name.split("/")
        objective, batch = _task_probe(this, name, tokens_per_step, dense=variant == "teacher")
        if variant == "quantize":
            assert recipe.quantize is not None
            FakeQuantizer(objective.student, **numerics(recipe.quantize))
    return _time(objective, batch, recipe.precision) / int(batch["attention_mask"].sum())


def _pretraining_probe(
    recipe: Recipe, settings: Teacher | Prune, corpus: Corpus
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if isinstance(settings, Prune):
        objective = student_objective(recipe.model, settings, recipe.distill, nsp=corpus.nsp)
    else:
        objective = teacher_objective(load_for_pretraining(recipe.model, nsp=corpus.nsp), settings, nsp=corpus.nsp)
    micro, _ = split_batch(settings.batch, settings.micro_batch)
    batch = _random_batch(objective, min(micro, max(1, PROBE_TOKENS // corpus.max_length)), corpus.max_length)
    batch["labels"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.15, batch["input_ids"], -100)
    if corpus.nsp:
        batch["next_sentence_label"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    return objective, batch


def _task_probe(
    this: Run, name: str, tokens_per_step: float, *, dense: bool
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    recipe = this.recipe
    spec: Task = recipe.tasks[name].resolved(name)
    task: task_data.Task = this.task(name)
    own_loss = dense or (spec.teacher is None and recipe.model_is_sparse and recipe.dense_model is None)
    # Timing needs a teacher of the right size, not a trained one.
    teacher = None if own_loss else load_for_task(recipe.model, task.kind, **task.model_kwargs())
    objective = transfer_objective(recipe.model, teacher, spec, task)
    batch = _random_batch(objective, spec.batch or 32, max(8, round(tokens_per_step / (spec.batch or 32))))
    answers = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    keys = ("start_positions", "end_positions") if task.kind == "qa" else ("labels",)
    return objective, batch | dict.fromkeys(keys, answers)


def _random_batch(objective: nn.Module, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, objective.student.config.vocab_size, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = objective.student.config
    typed = families.of(config.model_type).token_types and config.type_vocab_size > 1
    return batch | ({"token_type_ids": torch.zeros_like(ids)} if typed else {})


def _time(objective: nn.Module, batch: dict[str, torch.Tensor], precision: str) -> float:
    """Median seconds of a full optimizer step; the first step, which allocates, is not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective.to(device).train()
    batch = {name: value.to(device) for name, value in batch.items()}
    optimizer = torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=0.0)
    counts = objective.counts(batch)
    seconds = []
    for _ in range(PROBE_STEPS):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(batch, counts)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
