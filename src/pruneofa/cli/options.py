"""Options of the command line that are generated from the models of a recipe."""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pruneofa.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

ISAS = "amx, avx512bf16, avx512vnni, avxvnni or avx2, on ARM neon_i8mm or neon, or scalar"
CUSTOM = "custom"  # the name of a task that has only --data
# The fields of a task's section that evaluation uses.
EVALUATED = ("data", "validation", "text", "label", "max_length", "stride", "validation_rows", "skip_bad_answers")
# Options of `quantize` that need --ptq, and those that exclude it.
CALIBRATION = ("calibration", "observer", "percentile")
TRAINING = (
    "teacher", "qat_epochs", "qat_lr", "qat_rows", "warmup", "weight_decay", "max_grad_norm", "hard", "kd",
    "hidden", "temperature", "dropout", "freeze_embeddings", "save_minutes", "freeze", "batch",
)  # fmt: skip


def add_fields(
    verb: argparse.ArgumentParser,
    model: "type[BaseModel]",
    prefix: str,
    *,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    title: str = "task",
) -> None:
    """Add an option --PREFIXNAME for each field of `model`: for the fields of `only`, or for all except `without`.

    The name of the option group is the prefix, or `title` without a prefix.
    """
    group = verb.add_argument_group(prefix.rstrip(".") or title)
    for name, field in model.model_fields.items():
        if (only and name not in only) or name in without:
            continue
        text = field.description or name.replace("_", " ")
        if not (field.is_required() or field.default is None or "(default" in text):
            text += f" (default {field.default})"
        several = name in ("text", "data", "source", "skip")
        values: dict[str, Any] = {"nargs": "+"} if several else {}
        if bool in (field.annotation, *get_args(field.annotation)):
            values = {"nargs": "?", "const": "true"}
        choices = get_origin(field.annotation) is Literal
        metavar = f"{{{','.join(get_args(field.annotation))}}}" if choices else name.upper()
        key = f"{prefix}{name}"
        group.add_argument(_flag(key), dest=key, **values, metavar=metavar, help=text.replace("%", "%%"))
        if "_" in name:  # as the recipe spells it
            group.add_argument(f"--{key}", dest=key, **values, help=argparse.SUPPRESS)


def _flag(key: str) -> str:
    """The option of a recipe's key."""
    return f"--{key.replace('_', '-')}"


def read_fields(options: argparse.Namespace, model: "type[BaseModel]", prefix: str) -> dict[str, Any]:
    """The values of the options from `add_fields` that were given, as values of a recipe section."""
    from pruneofa.recipe import parse_override

    def is_text(annotation: Any) -> bool:
        return annotation is str or get_origin(annotation) is Literal or any(map(is_text, get_args(annotation)))

    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        given = getattr(options, f"{prefix}{name}", None)
        if isinstance(given, list):
            values[name] = given[0] if len(given) == 1 and name != "skip" else given
        elif given is not None and is_text(field.annotation):
            values[name] = given  # not parsed: the name of a column may be 0 or #label
        elif given is not None:
            values |= parse_override(f"{name}={given}")
    return values


def refuse_unread(options: argparse.Namespace, prefix: str, reasons: Mapping[str, str]) -> None:
    """Raise InputError for an option --PREFIXNAME that was given though nothing reads it, with the reason of NAME."""
    for name, reason in reasons.items():
        if getattr(options, f"{prefix}{name}", None) is not None:
            raise InputError(f"{_flag(f'{prefix}{name}')} was given, but {reason}; omit it")


def refuse_unused(options: argparse.Namespace) -> None:
    """Raise InputError for an option of `quantize` that has no effect with the other options."""
    reason = "--ptq does not train" if options.ptq else "without --ptq training sets the static scales"
    for name in TRAINING if options.ptq else CALIBRATION:
        if getattr(options, name) is not None:
            raise InputError(f"{_flag(name)} was given, but {reason}; omit one of them")
    for name in ("freeze", *CALIBRATION) if options.activations == "dynamic" else ():
        if getattr(options, name) is not None:
            raise InputError(f"{_flag(name)} was given, but a scale per token needs no calibration; omit one of them")
    if options.percentile is not None and options.observer != "percentile":
        raise InputError("--percentile was given, but --observer is minmax; add --observer percentile, or omit it")


def with_option_names(message: str, options: argparse.Namespace) -> str:
    """The message of an InputError with this verb's options in place of the recipe keys from which it makes a section.

    "tasks.custom: no label column 'x'; set tasks.custom.label" becomes "no label column 'x'; set --label". Messages of
    the verbs that take a recipe are unchanged.
    """
    if "set" in options:
        return message
    task = getattr(options, "task", None)
    section = f"tasks.{task or CUSTOM}"

    def option(key: re.Match[str]) -> str:
        name = key["name"] if key["section"] in (section, "quantize") else f"{key['section']}.{key['name']}"
        value = "" if key["value"] in (None, "true") else f" {key['value']}"
        return _flag(name) + value if name in options else key[0]

    sections = "|".join(map(re.escape, (section, "quantize", "corpus", "teacher", "prune", "distill")))
    message = message.removeprefix("recipe: ")
    message = re.sub(rf"(?<![\w./-])(?P<section>{sections})\.(?P<name>\w+)(=(?P<value>\w+))?(?!\w)", option, message)
    message = re.sub(rf"(?<![\w./-]){re.escape(section)}: ", f"--task {task}: " if task else "", message)
    return re.sub(r"(?<![\w./-])data_root(?![\w./-])", "--data-root", message) if "data_root" in options else message


def read_task(options: argparse.Namespace) -> tuple[str, Any]:
    """The task's name and its section of a recipe, defaults filled in. Raises InputError where options are missing."""
    from pruneofa.recipe import KNOWN_TASKS, Task, check_task_name, unread, validate

    values = read_fields(options, Task, "")
    name = options.task or (CUSTOM if "data" in values else None)
    if name is None:
        raise InputError(
            "no task: give --task (sst2, mnli, qnli, qqp, squad), or --data FILE --text COLUMN --label COLUMN"
        )
    check_task_name(name)
    if name not in KNOWN_TASKS and not {"data", "text", "label"} <= set(values):
        missing = " and ".join(f"--{key}" for key in ("data", "text", "label") if key not in values)
        own = f"--task {name}: not one of {', '.join(KNOWN_TASKS)}" if options.task else "--data without --task"
        raise InputError(f"{own}, so it needs --data, --text and --label; got no {missing}")
    task = validate(Task, values, f"tasks.{name}").resolved(name)
    refuse_unread(options, "", unread.of_losses(task))
    if task.teacher is not None and not task.kd + task.hidden:
        raise InputError("--teacher was given, but --kd and --hidden are 0, so nothing is learned from it; omit one")
    return name, task


LABELS_ONLY = "no --teacher given: training on the labels only"


def learn_from_labels(options: argparse.Namespace, task: Any) -> Any:
    """The task's section for training without a teacher; `LABELS_ONLY` says it once nothing is wrong without torch.

    Raises InputError for an option that sets the losses with a teacher.
    """
    for name in ("hard", "kd", "hidden", "temperature"):
        if getattr(options, name) is not None:
            raise InputError(
                f"{_flag(name)} was given, but without --teacher a model learns from the labels only; add --teacher "
                "DIR, or omit it"
            )
    return task.model_copy(update={"hard": 1.0, "kd": 0.0, "hidden": 0.0})


def add_training(verb: argparse.ArgumentParser) -> None:
    """Add the options that all training verbs share."""
    verb.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="seed of data order, dropout and new heads (default 0)"
    )
    precision = (
        "training precision: bf16 (autocast over fp32 weights) or fp32 "
        "(default: bf16 where this processor computes in bf16, else fp32)"
    )
    verb.add_argument("--precision", choices=["bf16", "fp32"], help=precision)
    verb.add_argument("--data-root", help="folder to which relative data paths refer")
    verb.add_argument("--redo", action="store_true", help="replace OUT if its settings changed")
    verb.add_argument("--json", action="store_true", help="print as JSON")


def precision_of(options: argparse.Namespace) -> Literal["bf16", "fp32"]:
    """The precision that was given, else the fast one of this machine, which is found with torch."""
    from pruneofa.train.device import fast_precision

    return options.precision or fast_precision()


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value}: wanted 0 to {2**32 - 1}")
    return value
