"""The stages of the method, each a function to be read top to bottom: models in, trained model out."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruneofa.data import corpus as corpora
from pruneofa.data import tasks as task_data
from pruneofa.errors import InputError
from pruneofa.formats import scales
from pruneofa.formats.files import read_json, write_json
from pruneofa.formats.hub import local_folder
from pruneofa.recipe import Control, Corpus, Distill, Prune, Quantize, Task, Teacher
from pruneofa.train.evaluate import evaluate_model, label_order, load_task_model
from pruneofa.train.models import load_for_pretraining, load_for_task, load_tokenizer, reorder_classes, set_dropout
from pruneofa.train.objective import INPUTS, PretrainingObjective, TransferObjective
from pruneofa.train.prune import GradualPruner
from pruneofa.train.quantize import FakeQuantizer
from pruneofa.train.schedule import cyclic_lr, linear_lr, rewound_lr
from pruneofa.train.trainer import (
    LockCallback,
    PruningCallback,
    QuantizeCallback,
    batches,
    processes,
    split_batch,
    train,
)

VALIDATION_EXAMPLES = 512
CALIBRATION_BATCH = 32
Emit = Callable[[dict[str, Any]], None]


@dataclass
class Outcome:
    """What a stage made: a model to save, what it measured, and what it cost."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    metrics: dict[str, float]
    seconds: float = 0.0
    tokens: int = 0
    quantization: scales.Quantization | None = None

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder."""
        if self.model is not None and self.tokenizer is not None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.quantization is not None:
            scales.write(folder, self.quantization)


@dataclass(frozen=True)
class Text:
    """The corpus as the pre-training stages see it."""

    spec: Corpus
    built: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def collate(self) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
        """Batch items of this corpus."""
        return partial(corpora.collate, pad_token_id=self.tokenizer.pad_token_id)


def read_text(spec: Corpus, model: str, *, data_root: str | None, seed: int) -> Text:
    """Tokenize the corpus for `model`, or find it in the cache."""
    tokenizer = load_tokenizer(model)
    return Text(spec, corpora.build_corpus(spec, tokenizer, data_root=data_root, seed=seed), tokenizer)


def check_pretraining(model: str, teacher: Teacher | None, prune: Prune | None, distill: Distill, text: Corpus) -> None:
    """Carry out, without training, what can fail in the stages on text. Raises InputError."""
    distils_logits = prune is not None and distill.hard + distill.kd > 0
    loaded = load_for_pretraining(model, nsp=text.nsp, trained_head=teacher is None and distils_logits)
    longest = task_data.longest_input(loaded.config)
    if text.max_length > longest:
        raise InputError(f"corpus.max_length is {text.max_length} but {model} has {longest} positions; lower it")
    for settings in (teacher, prune):
        if settings is not None:
            split_batch(settings.batch, settings.micro_batch)
    if prune is not None:
        GradualPruner(loaded, **schedule(prune)).release()
        learning_rate(prune)(0)


def check_task(model: str, spec: Task, task: task_data.Task) -> None:
    """Carry out, without training, what can fail in the stages of a task. Raises InputError."""
    transfer_objective(model, spec.teacher, spec, task)
    if spec.teacher is not None:
        check_vocabulary(model, spec.teacher)
    split_batch(spec.batch or 1, None)


def check_vocabulary(model: str, other: str) -> None:
    """Raises InputError when two models number their tokens differently: one would read garbage."""
    mine, theirs = (load_tokenizer(path).get_vocab() for path in (model, other))
    if mine != theirs:
        raise InputError(
            f"{other}: its vocabulary ({len(theirs)} tokens) is not that of {model} ({len(mine)}); both models are "
            "given the same token ids, so use one with the same tokenizer"
        )


def prepare_teacher(
    model: str, settings: Teacher, text: Text, *, seed: int, precision: str, work: Path, emit: Emit
) -> Outcome:
    """Teacher preparation: the dense model learns MLM (+ NSP) on the corpus (method.md A3)."""
    transformers.set_seed(seed)
    teacher = load_for_pretraining(model, nsp=text.spec.nsp)
    objective = teacher_objective(teacher, settings, nsp=text.spec.nsp)
    rate = partial(linear_lr, total=settings.steps, warmup=int(settings.steps * settings.warmup))
    clock = _pretrain(objective, settings, text, rate, "teacher", seed, precision, work, emit, [])
    return Outcome(teacher, text.tokenizer, validate(objective, text, seed, precision), **clock)


def prune_student(
    teacher: str,
    settings: Prune,
    distill: Distill,
    text: Text,
    *,
    seed: int,
    precision: str,
    work: Path,
    emit: Emit,
) -> Outcome:
    """Student pruning: gradual magnitude pruning, distilled from the prepared teacher it starts from."""
    transformers.set_seed(seed)
    objective = student_objective(teacher, settings, distill, nsp=text.spec.nsp)
    pruning = PruningCallback(**schedule(settings))
    rate = learning_rate(settings)
    clock = _pretrain(objective, settings, text, rate, "prune", seed, precision, work, emit, [pruning])
    return Outcome(objective.student, text.tokenizer, validate(objective, text, seed, precision), **clock)


def prune_once(
    teacher: str,
    settings: Prune,
    distill: Distill,
    control: Control,
    text: Text,
    *,
    seed: int,
    precision: str,
    work: Path,
    emit: Emit,
) -> Outcome:
    """The control: the teacher pruned in one shot, locked, trained on the prune stage's tokens.

    Every learning rate of the control is tried; the lowest validation loss of the objective wins.
    """
    candidates = []
    for lr in control.lr:
        folder = work / f"lr-{lr:g}"
        if not (folder / "done.json").exists():
            transformers.set_seed(seed)
            objective = student_objective(teacher, settings, distill, nsp=text.spec.nsp)
            once = GradualPruner(objective.student, **{**schedule(settings), "begin": 0, "end": 1, "stop": 1})
            once.step(1)
            once.release()
            trial = settings.model_copy(update={"lr": lr})
            rate = partial(linear_lr, total=settings.steps, warmup=int(settings.steps * settings.warmup))
            name = f"control lr {lr:g}"
            clock = _pretrain(objective, trial, text, rate, name, seed, precision, folder, emit, [LockCallback()])
            metrics = validate(objective, text, seed, precision)
            if processes().is_main_process:
                objective.student.save_pretrained(folder / "model")
                write_json(folder / "done.json", {"metrics": metrics, "lr": lr, **clock})
                for checkpoint in folder.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
            processes().wait_for_everyone()
        candidates.append((read_json(folder / "done.json"), folder / "model"))
    best, model = min(candidates, key=lambda candidate: candidate[0]["metrics"]["loss"])
    metrics = (
        best["metrics"] | {"lr": best["lr"]} | {f"loss_lr_{c['lr']:g}": c["metrics"]["loss"] for c, _ in candidates}
    )
    student = load_for_pretraining(str(model), nsp=text.spec.nsp)
    metrics["tokens_of_all_rates"] = sum(c["tokens"] for c, _ in candidates)
    seconds = sum(c["seconds"] for c, _ in candidates)
    return Outcome(student, text.tokenizer, metrics, seconds, best["tokens"])


def fine_tune(
    model: str,
    teacher: str | None,
    spec: Task,
    task: task_data.Task,
    *,
    locked: bool,
    stage: str,
    seed: int,
    precision: str,
    work: Path,
    emit: Emit,
) -> Outcome:
    """Fine-tune `model` on a task, distilled from `teacher` if there is one, `locked` to its sparsity pattern.

    Without a teacher it learns from the task's own loss alone, which is how dense task teachers are made.
    """
    transformers.set_seed(seed)
    tokenizer = load_tokenizer(model)
    objective = transfer_objective(model, teacher, spec, task)
    if locked and spec.dropout is not None:
        set_dropout(objective.student, spec.dropout)
    data = task.train.train_dataset(spec.batch, seed, spec.epochs)
    steps = len(data) // spec.batch
    clock = train(
        objective,
        stage=stage,
        work=work,
        dataset=data,
        collate=task.collate,
        steps=steps,
        batch=spec.batch,
        lr=spec.lr,
        rate=partial(linear_lr, total=steps, warmup=int(steps * spec.warmup)),
        emit=emit,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        precision=precision,
        seed=seed,
        callbacks=[LockCallback()] if locked else [],
    )
    metrics = evaluate_model(objective.student, task)
    return Outcome(objective.student, tokenizer, metrics, **clock)


def quantize_aware(
    model: str,
    teacher: str | None,
    spec: Task,
    settings: Quantize,
    task: task_data.Task,
    *,
    stage: str,
    seed: int,
    precision: str,
    work: Path,
    emit: Emit,
) -> Outcome:
    """Quantization-aware training: fine-tune a task model through its int8 arithmetic, locked to its pattern.

    The weights of the outcome are on the int8 grid, and its metrics are those of the int8 arithmetic.
    """
    transformers.set_seed(seed)
    student = task_student(model, task)
    objective = transfer_objective(student, teacher, spec, task)
    if spec.dropout is not None:
        set_dropout(student, spec.dropout)
    quantizer = FakeQuantizer(student, **numerics(settings))
    data, steps = qat_dataset(spec, task, seed)
    clock = train(
        objective,
        stage=stage,
        work=work,
        dataset=data,
        collate=task.collate,
        steps=steps,
        batch=spec.batch,
        lr=spec.qat_lr,
        rate=partial(linear_lr, total=steps, warmup=int(steps * spec.warmup)),
        emit=emit,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        precision=precision,
        seed=seed,
        callbacks=[LockCallback(), QuantizeCallback(quantizer, settings.freeze)],
    )
    return _quantized(student, quantizer, load_tokenizer(model), task, **clock)


def quantize_trained(model: str, settings: Quantize, task: task_data.Task, *, seed: int) -> Outcome:
    """Post-training quantization: a task model rounded as it is; static ranges from some of its training data.

    The examples are drawn with `seed`. Outcome as of `quantize_aware`.
    """
    start = time.monotonic()
    student = task_student(model, task)
    quantizer = FakeQuantizer(student, **numerics(settings))
    if settings.activations == "static":
        assert task.train is not None
        drawn = np.random.default_rng(seed).permutation(len(task.train))[: settings.calibration]
        device = next(student.parameters()).device
        chosen = Subset(task.train, sorted(map(int, drawn)))
        inputs = (
            {name: value.to(device) for name, value in batch.items() if name in INPUTS}
            for batch in batches(chosen, task.collate, CALIBRATION_BATCH)
        )
        quantizer.calibrate(inputs, settings.percentile if settings.observer == "percentile" else None)
    return _quantized(student, quantizer, load_tokenizer(model), task, seconds=time.monotonic() - start)


def _quantized(
    student: PreTrainedModel,
    quantizer: FakeQuantizer,
    tokenizer: PreTrainedTokenizerBase,
    task: task_data.Task,
    **clock: Any,
) -> Outcome:
    """Fold the quantizer into the model, and measure what the engine will compute."""
    folded = quantizer.fold()
    metrics = evaluate_model(student, task)
    quantizer.release()
    return Outcome(student, tokenizer, metrics, **clock, quantization=folded)


def numerics(settings: Quantize) -> dict[str, Any]:
    """The arguments of `FakeQuantizer` that a quantize section holds."""
    return settings.model_dump(include={"weights", "activations", "embeddings"})


def qat_dataset(spec: Task, task: task_data.Task, seed: int) -> tuple[Any, int]:
    """What quantization-aware training reads, and its number of steps.

    `qat_rows` limits an epoch to that share of the features, whole batches out of all in their shuffled order.
    """
    assert task.train is not None
    data = task.train.train_dataset(spec.batch, seed, spec.qat_epochs)
    share = min(1.0, spec.qat_rows / task.train.rows.num_rows) if spec.qat_rows else 1.0
    steps = spec.qat_epochs * max(1, round(share * data.steps_per_epoch))
    return Subset(data, range(steps * spec.batch)), steps


def task_student(model: str, task: task_data.Task) -> PreTrainedModel:
    """A fine-tuned model whose classes follow the task's order.

    Raises:
        InputError: it is quantized already, has no trained head for this kind of task, or other labels.
    """
    if scales.is_quantized(local_folder(model)):
        raise InputError(
            f"{model}: quantized already ({scales.SETTINGS} is in it), and quantizing twice loses accuracy for "
            "nothing; name the folder it was made from"
        )
    student = load_task_model(model, task.kind)
    if task.kind == "classification":
        order = label_order(student.config, task)
        reorder_classes(student, order)
        names = [student.config.id2label[index] for index in order]
        student.config.id2label = dict(enumerate(names))
        student.config.label2id = {name: index for index, name in enumerate(names)}
    return student


def schedule(settings: Prune) -> dict[str, Any]:
    """The arguments of `GradualPruner` that a prune section holds."""
    names = ("final", "begin", "end", "stop", "interval", "initial", "pattern", "scope", "skip")
    return {name: getattr(settings, name) for name in names}


def learning_rate(settings: Prune) -> Callable[[int], float]:
    """The multiple of the peak learning rate as a function of the step (method.md A2)."""
    warmup = int(settings.steps * settings.warmup)
    if settings.rewind == "none":
        return partial(linear_lr, total=settings.steps, warmup=warmup)
    rewound = rewound_lr if settings.rewind == "sawtooth" else cyclic_lr
    times = {"begin": settings.begin, "end": settings.end, "interval": settings.interval}
    return partial(rewound, total=settings.steps, warmup=warmup, **times)


def teacher_objective(teacher: PreTrainedModel, settings: Teacher, *, nsp: bool) -> PretrainingObjective:
    """Plain MLM (+ NSP)."""
    if settings.dropout is not None:
        set_dropout(teacher, settings.dropout)
    return PretrainingObjective(
        teacher, None, hard=1.0, kd=0.0, hidden=0.0, temperature=1.0, positions="masked", nsp=nsp
    )


def student_objective(teacher: str, settings: Prune, distill: Distill, *, nsp: bool) -> PretrainingObjective:
    """A student that starts as a copy of its teacher, and the losses between them."""
    student = load_for_pretraining(teacher, nsp=nsp)
    if settings.dropout is not None:
        set_dropout(student, settings.dropout)
    return PretrainingObjective(student, load_for_pretraining(teacher, nsp=nsp), nsp=nsp, **distill.model_dump())


def transfer_objective(
    model: str | PreTrainedModel, teacher: str | PreTrainedModel | None, spec: Task, task: task_data.Task
) -> TransferObjective:
    """A task model and the losses it is trained with; without a teacher the task's own loss alone.

    Raises InputError when the folder `teacher` has no trained head for this task.
    """
    student = load_for_task(model, task.kind, **task.model_kwargs()) if isinstance(model, str) else model
    if teacher is None:
        return TransferObjective(student, None, kind=task.kind, hard=1.0, kd=0.0, temperature=1.0)
    loaded = load_task_model(teacher, task.kind) if isinstance(teacher, str) else teacher
    if task.kind == "classification":
        reorder_classes(loaded, label_order(loaded.config, task))
    losses = spec.model_dump(include={"hard", "kd", "hidden", "temperature"})
    return TransferObjective(student, loaded, kind=task.kind, **losses)


def _pretrain(
    objective: PretrainingObjective,
    settings: Teacher | Prune,
    text: Text,
    rate: Callable[[int], float],
    stage: str,
    seed: int,
    precision: str,
    work: Path,
    emit: Emit,
    callbacks: list[Any],
) -> dict[str, Any]:
    return train(
        objective,
        stage=stage,
        work=work,
        dataset=text.built.train(settings.steps * settings.batch, seed=seed),
        collate=text.collate,
        steps=settings.steps,
        batch=settings.batch,
        micro_batch=settings.micro_batch,
        lr=settings.lr,
        rate=rate,
        emit=emit,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        precision=precision,
        checkpoint_activations=settings.checkpoint_activations,
        save_steps=settings.save_steps,
        seed=seed,
        callbacks=callbacks,
    )


@torch.no_grad()
def validate(objective: PretrainingObjective, text: Text, seed: int, precision: str) -> dict[str, float]:
    """Losses of the objective on held-out articles, dropout off."""
    device = next(objective.parameters()).device
    data = text.built.validation(VALIDATION_EXAMPLES, seed=seed)
    held_out = [{k: v.to(device) for k, v in batch.items()} for batch in batches(data, text.collate, 16)]
    counts = torch.stack([objective.counts(batch) for batch in held_out]).sum(0)
    objective.eval()
    totals: dict[str, float] = {}
    for batch in held_out:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts = objective(batch, counts)
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals
