"""The verb `prune`."""

import argparse
from pathlib import Path
from typing import Any

from pruneofa.cli.options import add_fields, add_training, precision_of, read_fields, refuse_unread
from pruneofa.cli.show import print_value
from pruneofa.errors import InputError


def describe(verb: argparse.ArgumentParser) -> None:
    """Prune a dense encoder on plain text and write a sparse pre-trained model.

    There are two stages. Teacher preparation trains MODEL on the corpus. Student pruning prunes a copy of it while it
    learns from the teacher. The defaults are the published ones: 90 % sparsity, 100,000 steps of batch 256 in each
    stage, which takes days on a GPU. With --one-shot nothing is trained: layer by layer, the weights that are left are
    fitted to the outputs of MODEL on some hundred texts, such as those of your task. That takes minutes on a CPU, and
    transfer follows. The same command resumes an interrupted run.
    """
    from pruneofa import recipe
    from pruneofa.recipe import unread

    verb.usage = "pruneofa prune MODEL OUT --corpus.source TEXT [options]"
    verb.epilog = (
        "examples: pruneofa prune MODEL sparse --corpus.source wiki/ --prune.final 0.85; "
        "pruneofa prune MODEL sparse --one-shot --corpus.source reviews.csv --corpus.column review"
    )
    verb.add_argument("model", help="folder or hub id of a dense encoder")
    verb.add_argument(
        "out", type=Path, help="folder of the sparse model; the prepared teacher is written to OUT-teacher"
    )
    verb.add_argument("--no-teacher", action="store_true", help="skip teacher preparation and distil from MODEL itself")
    one_shot = "prune once, without teacher preparation and training; --prune.score is hessian if it is not given"
    verb.add_argument("--one-shot", action="store_true", help=one_shot)
    sections = {
        "corpus": recipe.Corpus,
        "teacher": recipe.Teacher,
        "prune": recipe.Prune,
        "distill": recipe.Distill,
    }
    for name, model in sections.items():
        add_fields(verb, model, f"{name}.")
    add_training(verb)

    def call(options: argparse.Namespace) -> int:
        values: dict[str, Any] = {"name": options.out.name, "model": options.model, "seed": options.seed}
        values["data_root"] = options.data_root
        for name, model in sections.items():
            values[name] = read_fields(options, model, f"{name}.")
        if options.one_shot:
            values |= _one_shot(values)
        if options.no_teacher or options.one_shot:
            which = "--one-shot" if options.one_shot else "--no-teacher"
            refuse_unread(options, "teacher.", dict.fromkeys(values["teacher"], f"{which} prepares none"))
            values["teacher"] = None
        settings = recipe.validate(recipe.Recipe, values)
        from pruneofa.data import sources

        assert settings.prune is not None and settings.corpus is not None
        refuse_unread(options, "corpus.", sources.unread(settings.corpus.source, settings.data_root))
        if settings.teacher is not None:
            refuse_unread(options, "teacher.", unread.of_checkpoints(settings.teacher))
        refuse_unread(options, "prune.", unread.of_prune(settings.prune))
        refuse_unread(options, "distill.", unread.of_distill(settings.distill))
        from pruneofa.run import single  # torch, which takes seconds: a wrong option is refused before

        settings = settings.model_copy(update={"precision": precision_of(options)})
        metrics = single.prune(settings, options.out, redo=options.redo)
        print_value({"out": str(options.out), **metrics}, options.json)
        return 0

    verb.set_defaults(call=call)


def _one_shot(values: dict[str, Any]) -> dict[str, Any]:
    """The sections of a recipe that prunes without training; options that were given stay.

    Raises InputError for the option that says otherwise.
    """
    if values["prune"].get("one_shot") is False:
        raise InputError("--prune.one-shot false was given, but --one-shot prunes at once; omit one of them")
    # What is measured at the end, and what scores from gradients refer to: the hidden states, as no head is needed.
    losses = {"hard": 0.0, "kd": 0.0, "hidden": 1.0}
    return {
        "corpus": {"nsp": False, **values["corpus"]},
        "prune": {"one_shot": True, "score": "hessian", "steps": 0, **values["prune"]},
        "distill": ({} if losses.keys() & values["distill"] else losses) | values["distill"],
    }
