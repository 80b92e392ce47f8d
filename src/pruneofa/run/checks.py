"""Checks of the inputs of all steps before anything is written."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pruneofa.data import sources
from pruneofa.data import tasks as task_data
from pruneofa.engine.engine import choose_isa
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats import pattern
from pruneofa.formats.architecture import read_architecture
from pruneofa.progress import notice
from pruneofa.recipe import Corpus, Distill, Prune, Recipe, Task, Teacher, unread
from pruneofa.run.fine_tuning import transfer_objective
from pruneofa.run.folder import refuse_links, refuse_others
from pruneofa.run.inputs import Inputs, teacher_path
from pruneofa.run.lineage import lost_pattern
from pruneofa.run.plan import losses
from pruneofa.run.pretraining import learning_rate, schedule
from pruneofa.run.stage import WORK, Stage, Step
from pruneofa.train import curvature, layerwise
from pruneofa.train.device import processes, split_batch
from pruneofa.train.lock import sparsity_of
from pruneofa.train.models import load_config, load_for_pretraining, load_tokenizer
from pruneofa.train.prune import GradualPruner

# By how much a model's sparsity may exceed that it is pruned to: weights of a dense model can be zero too, and not all
# programs round the number of zeros down.
ROUNDING = 1e-3


def check_run(
    recipe: Recipe, inputs: Inputs, steps: Sequence[Step], folder: Path, redo: bool, *, tokenize: bool = True
) -> None:
    """All that a run in `folder` refuses before it writes, but for changed stages, so that a dry run refuses it too.

    Raises as `refuse_links`, `refuse_others`, `check` and, for a recipe with int8, `check_engine`.
    """
    if processes().is_main_process:
        _say_unread(recipe)
    refuse_links((step for step in steps if isinstance(step, Stage)), folder / WORK)
    refuse_others(steps, folder, redo)
    check(recipe, inputs, steps, tokenize=tokenize)
    if recipe.quantize:
        check_engine(recipe)


def _say_unread(recipe: Recipe) -> None:
    vain = unread.given_in_vain(recipe)
    if recipe.corpus is not None:
        for name, reason in sources.unread(recipe.corpus.source, recipe.data_root).items():
            if getattr(recipe.corpus, name) != Corpus.model_fields[name].get_default():
                vain[reason] = [f"corpus.{name}"]
    for reason, keys in vain.items():
        notice(f"{', '.join(keys)}: no effect, since {reason}")


def check(recipe: Recipe, inputs: Inputs, steps: Iterable[Step], *, tokenize: bool = True) -> None:
    """Raises InputError for invalid inputs of unfinished stages; reads the whole corpus if `tokenize`."""
    pending = {step.id for step in steps if isinstance(step, Stage) and step.status != "done"}
    if recipe.corpus and recipe.corpus.streaming and processes().num_processes > 1:
        raise InputError(
            "corpus.streaming works with one process only; set corpus.streaming=false to train with several"
        )
    if recipe.model_is_sparse:
        pattern.inspect(recipe.model)
    if recipe.corpus and any(stage.task is None for stage in pending):
        check_pretraining(recipe.model, recipe.teacher, recipe.prune, recipe.distill, recipe.corpus)
        if tokenize:
            inputs.text().read()
    for name in recipe.tasks:
        if any(stage.task == name for stage in pending):
            spec = recipe.tasks[name].resolved(name)
            for teacher in dict.fromkeys(teacher_path(spec, seed) for seed in recipe.seeds):
                check_task(recipe.model, teacher, spec, inputs.task(name))
            if recipe.dense_model is not None and spec.teacher is None:
                check_vocabulary(recipe.model, recipe.dense_model)
                check_inputs(recipe.dense_model, inputs.task(name))
                if spec.hidden > 0:
                    _check_hidden(recipe.model, recipe.dense_model, f"tasks.{name}.hidden")


def _check_hidden(model: str, dense_model: str, field: str) -> None:
    """Raises InputError unless both have hidden states of one size, as `field` needs them."""
    configs = [load_config(path) for path in (model, dense_model)]
    for key in ("num_hidden_layers", "hidden_size"):
        wanted, got = (getattr(config, key) for config in configs)
        if got != wanted:
            raise InputError(
                f"{field} is above 0, but {key} of dense_model {dense_model} is {got}, wanted the model's {wanted}; "
                f"set {field}: 0, or give the dense model that was pruned"
            )


def check_engine(recipe: Recipe) -> None:
    """Raises InputError or ImportError if the engine cannot run the models that the tasks' stages will make."""
    choose_isa(None)
    trained = any(task.teacher is None for task in recipe.tasks.values())  # from dense_model; given ones torch runs
    for model in filter(None, (recipe.model, recipe.dense_model if trained else None)):
        # The head is not checked: the tasks' stages replace it.
        read_architecture(load_config(model).to_dict() | {"architectures": None}, model)


def check_pattern(sparse: str | None, model: str) -> None:
    """Raises CheckFailed naming layer and count when zeros of `sparse`, if known, are not zero in `model`."""
    if sparse is None:
        return
    if lost := lost_pattern(sparse, model):
        raise CheckFailed(lost)


def check_pretraining(model: str, teacher: Teacher | None, prune: Prune | None, distill: Distill, text: Corpus) -> None:
    """Perform the parts of the stages on text that can fail, without training. Raises InputError."""
    distils_logits = prune is not None and distill.hard + distill.kd > 0
    loaded = load_for_pretraining(model, nsp=text.nsp, trained_head=teacher is None and distils_logits)
    longest = task_data.longest_input(loaded.config)
    if text.max_length > longest:
        raise InputError(f"corpus.max_length is {text.max_length} but {model} has {longest} positions; lower it")
    for settings in (teacher, prune):
        if settings is not None and settings.steps:
            split_batch(settings.batch, settings.micro_batch)
    if prune is not None:
        pruner = GradualPruner(loaded, **schedule(prune))
        _check_sparsity(model, pruner, prune)
        if prune.score == "obs":
            curvature.check_memory(pruner.weights, prune.block, prune.pattern)
        elif prune.score == "hessian":
            layerwise.check_memory(pruner.weights, prune.calibration * text.max_length, loaded.num_parameters())
        pruner.release()
        if prune.steps:
            learning_rate(prune)(0)


def _check_sparsity(model: str, pruner: GradualPruner, prune: Prune) -> None:
    """Raises InputError when the model has more zeros than pruning would leave: the others would train again."""
    zeros = {name: weight == 0 for name, weight in pruner.weights.items()}
    sparsity = sparsity_of(pruner.weights, zeros)["encoder"]
    if sparsity > prune.final + ROUNDING:
        remedy = "raise it" if pattern.ratio_of(prune.pattern) is None else "choose another prune.pattern"
        raise InputError(
            f"prune.final is {prune.final:g}, but {model} has a sparsity of {sparsity:.3g} already, wanted at least "
            f"that; {remedy}, or give the dense model"
        )


def check_task(model: str, teacher: str | None, spec: Task, task: task_data.Task) -> None:
    """Perform the parts of a task's stages that can fail, without training. Raises InputError."""
    transfer_objective(model, teacher, losses(spec), task)
    if teacher is not None:
        check_vocabulary(model, teacher)
        check_inputs(teacher, task)
    split_batch(spec.batch or 1, None)


def check_vocabulary(model: str, other: str) -> None:
    """Raises InputError when two models have different vocabularies, so that token ids have different meanings."""
    wanted, got = (load_tokenizer(path).get_vocab() for path in (model, other))
    if got != wanted:
        raise InputError(
            f"{other}: its vocabulary ({len(got)} tokens) differs from that of {model} ({len(wanted)}), but both "
            "models get the same token ids; use a model with the same tokenizer"
        )


def check_inputs(model: str, task: task_data.Task) -> None:
    """Raises InputError when a dense model of a task is too small for inputs that were made for the sparse one."""
    splits = [data for data in (task.train, *task.evaluations.values()) if data is not None]
    config = load_config(model)
    used = max((int(data.types.max()) + 1 for data in splits if data.types is not None), default=0)
    if 0 < (types := task_data.token_types(config)) < used:  # a model without any ignores them
        raise InputError(
            f"tasks.{task.name}: an input has {used} token types but {model} has {types}; use another model"
        )
    longest = max(int(data.lengths.max()) for data in splits)
    positions = task_data.longest_input(config)
    if longest > positions:
        raise InputError(
            f"tasks.{task.name}: an input has {longest} tokens but {model} has {positions} positions; lower max_length "
            f"to {positions}, or use another model"
        )
