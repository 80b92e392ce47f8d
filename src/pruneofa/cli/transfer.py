"""The verb `transfer`."""

import argparse
from pathlib import Path

from pruneofa.cli.options import LABELS_ONLY, add_fields, add_training, learn_from_labels, precision_of, read_task
from pruneofa.cli.show import print_metrics, say_pattern
from pruneofa.progress import notice


def describe(verb: argparse.ArgumentParser) -> None:
    """Fine-tune a sparse model on a task, with its sparsity pattern locked: zeros stay zero.

    With --teacher the model is distilled from a dense model of the task, without it is trained on the labels only. The
    metrics on the validation data are printed. The same command resumes an interrupted run.
    """
    from pruneofa import recipe

    verb.usage = (
        "pruneofa transfer SPARSE OUT (--task T | --data FILE --text A [B] --label L) [--teacher DIR] [options]"
    )
    verb.epilog = "example: pruneofa transfer runs/minilm-90/sparse out --data reviews.csv --text review --label stars"
    verb.add_argument("sparse", help="folder or hub id of the sparse model; its zeros are the pattern")
    verb.add_argument("out", type=Path, help="folder of the task model")
    verb.add_argument("--task", metavar="T", help="sst2, mnli, qnli, qqp or squad; or a name for your own --data")
    # The omitted fields set how a run trains the dense teacher and the int8 model.
    add_fields(verb, recipe.Task, "", without=("dense_epochs", "dense_lr", "qat_epochs", "qat_lr", "qat_rows"))
    add_training(verb)

    def call(options: argparse.Namespace) -> int:
        name, spec = read_task(options)
        if spec.teacher is None:
            spec = learn_from_labels(options, spec)
        say_pattern(options.sparse)
        if spec.teacher is None:
            notice(LABELS_ONLY)
        from pruneofa.formats.files import read_json
        from pruneofa.run import single  # torch, which takes seconds: what is wrong without it is said before
        from pruneofa.run.stage import EVALUATION

        training = {"seed": options.seed, "precision": precision_of(options)}
        root, redo = options.data_root, options.redo
        metrics = single.transfer(options.sparse, options.out, name, spec, data_root=root, redo=redo, **training)
        rows = read_json(options.out / EVALUATION).get("rows")
        print_metrics({"out": str(options.out), **metrics}, options.json, rows)
        return 0

    verb.set_defaults(call=call)
