"""The stages on plain text: teacher preparation, student pruning, and the control model.

Each stage is a function from its settings and a model to a trained model.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruneofa.data import corpus as corpora
from pruneofa.errors import Diverged, InputError
from pruneofa.formats.cache import cached_folder, damage
from pruneofa.formats.files import read_json, remove_folder, write_json
from pruneofa.formats.hub import local_folder
from pruneofa.formats.sentence import read_sentence
from pruneofa.progress import notice
from pruneofa.recipe import Corpus, Distill, Prune, Teacher, unread
from pruneofa.run.one_shot import one_shot_schedule, prune_at_once
from pruneofa.run.selections import layer_fit, obs_blocks
from pruneofa.run.stage import Job, Model, Outcome, unused
from pruneofa.train.callbacks import LockCallback, PruningCallback
from pruneofa.train.device import own_device, processes, shared_progress
from pruneofa.train.micro_batches import batches
from pruneofa.train.models import has_pretraining_head, load_for_pretraining, load_tokenizer, set_dropout
from pruneofa.train.objective import PretrainingObjective
from pruneofa.train.prune import GradualPruner
from pruneofa.train.schedule import cyclic_lr, linear_lr, rewound_lr
from pruneofa.train.trainer import train

VALIDATION_EXAMPLES = 512
CLOCK = "clock.json"  # beside a model pruned in one shot: the seconds and tokens that it took
SELECTIONS = "selections.json"  # beside the checkpoints: tokens that the scores took, by the step of the selection
UNUSED_BY_CONTROL = (
    "lr", "begin", "end", "stop", "interval", "initial", "rewind", "score", "one_shot", "calibration", "gradients",
    "block", "dampening",
)  # fmt: skip
# The location of the text has no influence; what is read there, and of which column, is an input.
SOURCE = unused("source", "config", "column")


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher is prepared."""

    teacher: Teacher
    corpus: Corpus = field(metadata=SOURCE)
    seed: int
    precision: str


@dataclass(frozen=True)
class PruneSettings:
    """How the student is pruned."""

    prune: Prune = field(metadata=unused(also=unread.of_prune))
    distill: Distill = field(metadata=unused(also=unread.of_distill))
    corpus: Corpus = field(metadata=SOURCE)
    seed: int
    precision: str


@dataclass(frozen=True)
class ControlSettings:
    """How the control is trained: pruned in one shot, with each of several learning rates."""

    prune: Prune = field(metadata=unused(*UNUSED_BY_CONTROL))
    distill: Distill = field(metadata=unused(also=unread.of_distill))
    rates: tuple[float, ...]
    corpus: Corpus = field(metadata=SOURCE)
    seed: int
    precision: str


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


def prepare_teacher(settings: TeacherSettings, job: Job, *, model: Model, text: Text) -> Outcome:
    """Teacher preparation: the dense model learns MLM (+ NSP) on the corpus (docs/method.md)."""
    embedder = _embedder(model.path)
    transformers.set_seed(settings.seed)
    teacher = load_for_pretraining(model.path, nsp=text.spec.nsp)
    objective = teacher_objective(teacher, settings.teacher, nsp=text.spec.nsp)
    clock = _train(objective, settings.teacher, text, _linear_rate(settings.teacher), settings, job, [])
    return Outcome(teacher, text.tokenizer, validate(objective, text, settings), **clock, sentence=embedder)


def prune_student(settings: PruneSettings, job: Job, *, teacher: Model, text: Text) -> Outcome:
    """Student pruning, distilled from the prepared teacher it starts from.

    It is pruned gradually during training; or, with one_shot, before training, which then keeps the pattern locked, or
    is left out.
    """
    embedder = _embedder(teacher.path)
    transformers.set_seed(settings.seed)
    objective = student_objective(teacher.path, settings.prune, settings.distill, nsp=text.spec.nsp)
    clock: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
    counts = job.work / SELECTIONS
    load_dense = partial(load_for_pretraining, teacher.path, nsp=text.spec.nsp)
    if settings.prune.at_once:
        clock = _prune_at_once(objective, load_dense, settings, text, job.work / "pruned")
        pruning: Any = LockCallback(skip_zeros=settings.prune.skip_zeros)
    else:
        examples = partial(_examples, text)
        options: dict[str, Any] = {"seed": settings.seed, "counts": counts}
        blocks = obs_blocks(objective, settings.prune, examples, precision=settings.precision, **options)
        fit = layer_fit(objective, load_dense, settings.prune, examples, **options)
        pruning = PruningCallback(**schedule(settings.prune), blocks=blocks, fit=fit)
    if settings.prune.steps:
        rate = learning_rate(settings.prune)
        trained = _train(objective, settings.prune, text, rate, settings, job, [pruning])
        clock = {name: clock[name] + trained[name] for name in clock}
        clock["tokens"] += sum(read_json(counts).values()) if counts.exists() else 0
    student = _without_random_head(objective.student, teacher.path, settings.distill)
    return Outcome(student, text.tokenizer, validate(objective, text, settings), **clock, sentence=embedder)


def _embedder(model: str) -> Path | None:
    """The folder of a sentence-transformers model, so that what is made from it stays one; None for any other."""
    folder = local_folder(model, ("*.json",))
    try:
        return folder if read_sentence(folder) is not None else None
    except InputError as error:
        if processes().is_main_process:
            notice(f"{model}: the new model does not keep its settings of sentence-transformers: {error}")
        return None


def _without_random_head(student: PreTrainedModel, teacher: str, distill: Distill) -> PreTrainedModel:
    """The student, or only its encoder if its teacher's folder has no head and no loss has trained the new one."""
    if distill.hard + distill.kd > 0 or has_pretraining_head(teacher):
        return student
    return cast(PreTrainedModel, student.base_model)


def _prune_at_once(
    objective: PretrainingObjective,
    load_dense: Callable[[], PreTrainedModel],
    settings: PruneSettings,
    text: Text,
    folder: Path,
) -> dict[str, Any]:
    """Prune the student and save it in `folder`, or load it from there if an earlier attempt did so.

    Returns what it took, {"seconds", "tokens"}.
    """

    def make(target: Path) -> None:
        examples = partial(_examples, text, settings.seed)
        options: dict[str, Any] = {"seed": settings.seed, "precision": settings.precision}
        kept = folder.with_name("layers")
        clock = prune_at_once(objective, load_dense, settings.prune, examples, **options, kept=kept)
        objective.student.save_pretrained(target)
        write_json(target / CLOCK, clock)

    if processes().is_main_process:
        cached_folder(folder, make)
    else:  # a barrier has a time limit, and this can take an hour
        while damage(folder) is not None:
            time.sleep(1)
    processes().wait_for_everyone()
    objective.to(own_device())
    pruned = load_for_pretraining(str(folder), nsp=text.spec.nsp)
    objective.student.load_state_dict(pruned.state_dict())
    return read_json(folder / CLOCK)


def _examples(text: Text, seed: int, count: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """`count` training examples of the corpus in batches of `size`."""
    return batches(text.built.train(count, seed=seed), text.collate, size)


def train_control(settings: ControlSettings, job: Job, *, teacher: Model, text: Text) -> Outcome:
    """The control: the teacher pruned in one shot, locked, trained on the prune stage's tokens.

    Every learning rate of the control is tried; the model with the lowest validation loss is kept. Raises InputError
    if training diverges with each of them.
    """
    embedder = _embedder(teacher.path)
    trials = [(_trial(settings, lr, job, teacher, text), trial_folder(job.work, lr)) for lr in settings.rates]
    finished = [(trial, folder) for trial, folder in trials if trial["metrics"] is not None]
    if not finished:
        rates = ", ".join(f"{lr:g}" for lr in settings.rates)
        raise InputError(f"{job.name}: training diverged with every learning rate ({rates}); lower control.lr")
    best, folder = min(finished, key=lambda trial: trial[0]["metrics"]["loss"])
    losses = {f"loss_lr_{trial['lr']:g}": trial["metrics"]["loss"] for trial, _ in finished}
    metrics = best["metrics"] | {"lr": best["lr"]} | losses
    student = load_for_pretraining(str(folder / "model"), nsp=text.spec.nsp)
    metrics["tokens_of_all_rates"] = sum(trial["tokens"] for trial, _ in trials)
    seconds = sum(trial["seconds"] for trial, _ in trials)
    student = _without_random_head(student, teacher.path, settings.distill)
    return Outcome(student, text.tokenizer, metrics, seconds, best["tokens"], sentence=embedder)


def trial_folder(work: Path, lr: float) -> Path:
    """Folder of the control's training with this learning rate; done.json in it marks the training as finished."""
    return work / f"lr-{lr:g}"


def _trial(settings: ControlSettings, lr: float, job: Job, teacher: Model, text: Text) -> dict[str, Any]:
    """The control with one learning rate: {"metrics", "lr", "seconds", "tokens"}; its model is in `trial_folder`.

    If the losses or weights are not finite, metrics are None and there is no model.
    """
    folder, main = trial_folder(job.work, lr), processes().is_main_process
    done = read_json(folder / "done.json") if (folder / "done.json").exists() else None
    if done is None or (done["metrics"] is not None and damage(folder / "model") is not None):
        if main:
            which = f"{settings.rates.index(lr) + 1} of {len(settings.rates)}"
            notice(f"{job.name}: learning rate {lr:g}, {which}")
        transformers.set_seed(settings.seed)
        objective = student_objective(teacher.path, settings.prune, settings.distill, nsp=text.spec.nsp)
        by_magnitude = settings.prune.model_copy(update={"score": "magnitude"})
        once = GradualPruner(objective.student, **one_shot_schedule(by_magnitude))
        once.step(1)
        once.release()
        prune = settings.prune.model_copy(update={"lr": lr})
        # The report draws a curve per peak learning rate.
        trial = Job(job.name, folder, lambda event: job.emit(event | {"peak_lr": lr}))
        lock = LockCallback(skip_zeros=prune.skip_zeros)
        metrics = None
        try:
            clock = _train(objective, prune, text, _linear_rate(prune), settings, trial, [lock])
            found = validate(objective, text, settings)
            if not math.isfinite(found["loss"]):
                raise Diverged(f"{job.name}: the validation loss is {found['loss']}; lower control.lr", clock)
            metrics = found
        except Diverged as error:
            clock = error.clock
            notice(f"{error}: left out")
        if main:
            remove_folder(folder / "model")
            if metrics is not None:
                cached_folder(folder / "model", objective.student.save_pretrained)
            write_json(folder / "done.json", {"metrics": metrics, "lr": lr, **clock})
            for checkpoint in folder.glob("checkpoint-*"):
                remove_folder(checkpoint)
        processes().wait_for_everyone()
    return read_json(folder / "done.json")


def schedule(settings: Prune) -> dict[str, Any]:
    """The arguments of `GradualPruner` that a prune section holds."""
    if settings.at_once:
        return one_shot_schedule(settings)
    names = ("final", "begin", "end", "stop", "interval", "initial", "pattern", "scope", "skip", "score", "dampening")
    return {name: getattr(settings, name) for name in names}


def learning_rate(settings: Prune) -> Callable[[int], float]:
    """The multiple of the peak learning rate as a function of the step (docs/method.md, "Student pruning")."""
    if settings.rewind == "none" or settings.at_once:
        return _linear_rate(settings)
    warmup = int(settings.steps * settings.warmup)
    rewound = rewound_lr if settings.rewind == "sawtooth" else cyclic_lr
    times = {"begin": settings.begin, "end": settings.end, "interval": settings.interval}
    return partial(rewound, total=settings.steps, warmup=warmup, **times)


def _linear_rate(settings: Teacher | Prune) -> Callable[[int], float]:
    """Warmup, then linear decay, as a multiple of the peak learning rate."""
    return partial(linear_lr, total=settings.steps, warmup=int(settings.steps * settings.warmup))


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


def _train(
    objective: PretrainingObjective,
    optimization: Teacher | Prune,
    text: Text,
    rate: Callable[[int], float],
    settings: TeacherSettings | PruneSettings | ControlSettings,
    job: Job,
    callbacks: list[Any],
) -> dict[str, Any]:
    return train(
        objective,
        stage=job.name,
        work=job.work,
        dataset=text.built.train(optimization.steps * optimization.batch, seed=settings.seed, batch=optimization.batch),
        collate=text.collate,
        steps=optimization.steps,
        batch=optimization.batch,
        micro_batch=optimization.micro_batch,
        lr=optimization.lr,
        rate=rate,
        emit=job.emit,
        weight_decay=optimization.weight_decay,
        max_grad_norm=optimization.max_grad_norm,
        precision=settings.precision,
        checkpoint_activations=optimization.checkpoint_activations,
        save_steps=optimization.save_steps,
        save_minutes=optimization.save_minutes,
        seed=settings.seed,
        callbacks=callbacks,
    )


@torch.no_grad()
def validate(
    objective: PretrainingObjective, text: Text, settings: TeacherSettings | PruneSettings | ControlSettings
) -> dict[str, float]:
    """Losses of the objective on held-out articles, dropout off."""
    device = next(objective.parameters()).device
    data = text.built.validation(VALIDATION_EXAMPLES, seed=settings.seed)
    held_out = [{k: v.to(device) for k, v in batch.items()} for batch in batches(data, text.collate, 16)]
    counts = torch.stack([objective.counts(batch) for batch in held_out]).sum(0)
    objective.eval()
    totals: dict[str, float] = {}
    with shared_progress("validation", len(held_out)) as advance:
        for batch in held_out:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                parts = objective(batch, counts)
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            advance()
    return totals
