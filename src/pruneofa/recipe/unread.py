"""Settings that nothing reads, by what the others say: whoever gave one meant something by it."""

from typing import Any

from pruneofa.recipe.fields import Section
from pruneofa.recipe.model import Card, Quantize, Recipe, Task
from pruneofa.recipe.pretraining import REFITTED, Distill, Prune, Teacher

Reasons = dict[str, str]  # field -> why it is not read

NO_TEACHER = "without a teacher a model learns from the labels only"


def of_prune(prune: Prune) -> Reasons:
    """The fields of the section that pruning with its score, gradual or at once, does not read."""
    found: Reasons = {}
    if prune.score != "hessian":
        found["calibration"] = "only prune.score hessian reads it"
    if not (prune.score == "obs" or (prune.score == "fisher" and prune.at_once)):
        found["gradients"] = "only prune.score obs, and fisher in one shot, read it"
    if prune.score != "obs":
        found |= dict.fromkeys(("block", "dampening"), "only prune.score obs reads it")
    if prune.score in REFITTED:
        found["stop"] = f"with prune.score {prune.score} the last selection is at prune.end"
    if prune.at_once:
        schedule = ("begin", "end", "stop", "interval", "initial", "rewind")
        found |= dict.fromkeys(schedule, "all weights are pruned at once")
    if not prune.steps:
        trained = [name for name in Teacher.model_fields if name != "steps"]  # which has the settings of training alone
        found |= dict.fromkeys((*trained, "skip_zeros"), "prune.steps is 0, so nothing is trained")
    return found | of_checkpoints(prune)


def of_checkpoints(stage: Teacher | Prune) -> Reasons:
    """The fields of teacher preparation or pruning that say when to save, where another one does."""
    return {"save_minutes": "save_steps is given"} if stage.save_steps else {}


def of_distill(distill: Distill) -> Reasons:
    """The fields of the section that belong to a loss without weight."""
    found = {} if distill.kd else dict.fromkeys(("temperature", "positions"), "distill.kd is 0")
    return found | ({} if distill.hidden else {"hidden_norm": "distill.hidden is 0"})


def of_losses(task: Task) -> Reasons:
    """The fields of a task's section that belong to a loss without weight."""
    return {} if task.kd else {"temperature": "kd is 0"}


def of_task(task: Task, recipe: Recipe) -> Reasons:
    """The fields of a task's section that no stage of the recipe reads."""
    found = of_losses(task)
    if task.teacher is not None:
        found |= dict.fromkeys(("dense_epochs", "dense_lr"), "its teacher is given, so no dense model is trained")
    elif recipe.model_is_sparse and recipe.dense_model is None:
        found |= dict.fromkeys(("dense_epochs", "dense_lr", "hard", "kd", "hidden", "temperature"), NO_TEACHER)
    if recipe.quantize is None:
        found |= dict.fromkeys(("qat_epochs", "qat_lr", "qat_rows"), "quantize is null")
    return found


def of_quantize(quantize: Quantize) -> Reasons:
    """The fields of the section that belong to static scales where they are dynamic, or to a way not taken."""
    found = {} if quantize.observer == "percentile" else {"percentile": "quantize.observer is minmax"}
    calibration = ("calibration", "observer", "percentile")
    found |= {} if quantize.ptq else dict.fromkeys(calibration, "quantize.ptq is false")
    if quantize.activations == "dynamic":
        found |= dict.fromkeys(("freeze", *calibration), "a scale per token needs no calibration")
    return found


def given_in_vain(recipe: Recipe) -> dict[str, list[str]]:
    """The keys of the recipe that nothing reads and whose values are not the defaults, by the reason."""
    found: Reasons = {}

    def add(prefix: str, section: Section, reasons: Reasons, **defaults: Any) -> None:
        for name, field in type(section).model_fields.items():
            if name in reasons and getattr(section, name) != defaults.get(name, field.get_default()):
                found[f"{prefix}.{name}"] = reasons[name]

    if recipe.teacher is not None:
        add("teacher", recipe.teacher, of_checkpoints(recipe.teacher))
    if recipe.prune is not None:
        add("prune", recipe.prune, of_prune(recipe.prune), **recipe.prune.default_schedule())
        add("distill", recipe.distill, of_distill(recipe.distill))
    else:
        add("distill", recipe.distill, dict.fromkeys(Distill.model_fields, "prune is null"))
    if recipe.corpus is not None and recipe.prune is None and recipe.teacher is None:
        found["corpus"] = "teacher and prune are null"
    if recipe.dense_model is not None and all(task.teacher for task in recipe.tasks.values()):
        found["dense_model"] = "there is no task without a teacher of its own"
    if recipe.prune is None:
        add("card", recipe.card, dict.fromkeys(Card.model_fields, "prune is null, so no model card is written"))
        found |= {"seed": "teacher and prune are null"} if recipe.seed and recipe.teacher is None else {}
    for name, task in recipe.tasks.items():
        add(f"tasks.{name}", task, of_task(task, recipe))
    if recipe.quantize is not None:
        add("quantize", recipe.quantize, of_quantize(recipe.quantize))
    reasons = dict.fromkeys(found.values())
    return {reason: [key for key, why in found.items() if why == reason] for reason in reasons}
