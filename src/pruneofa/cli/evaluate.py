"""The verb `evaluate`."""

import argparse

from pruneofa.cli.options import EVALUATED, ISAS, add_fields, read_task
from pruneofa.cli.show import print_metrics


def describe(verb: argparse.ArgumentParser) -> None:
    """Compute the metrics of a task model on validation data.

    The engine runs packed folders. torch runs all other folders, unless --engine is given. The data are read and
    tokenized by the train extra, for the engine too: pip install '.[train]'.
    """
    from pruneofa import recipe

    verb.usage = "pruneofa evaluate PATH (--task T | --data FILE --text A [B] --label L) [options]"
    verb.epilog = "example: pruneofa evaluate runs/minilm-90/tasks/sst2/seed-0/transfer --task sst2 --data sst2"
    verb.add_argument("path", help="folder or hub id of a task model")
    verb.add_argument("--task", metavar="T", help="sst2, mnli, qnli, qqp or squad; or a name for your own --data")
    add_fields(verb, recipe.Task, "", only=EVALUATED)
    verb.add_argument("--data-root", help="folder to which relative data paths refer")
    group = verb.add_argument_group("engine")
    group.add_argument(
        "--engine", action="store_true", help="run the model with the engine, as packed folders always are"
    )
    choice = (
        "of the engine: int8 (default) or fp32; for torch: fp32 switches off the int8 simulation of a quantized folder"
    )
    group.add_argument("--precision", choices=["int8", "fp32"], help=choice)
    group.add_argument("--threads", type=int, metavar="N", help="threads of the engine (default: it chooses)")
    group.add_argument(
        "--isa",
        metavar="ISA",
        help=f"instruction set of the engine: {ISAS} (default: the fastest)",
    )
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        name, spec = read_task(options)
        from pruneofa.train.evaluate import evaluate  # torch, which takes seconds: a wrong option is refused before

        engine = {key: getattr(options, key) for key in ("engine", "precision", "threads", "isa")}
        metrics = evaluate(options.path, name, spec, data_root=options.data_root, whole=True, **engine)
        print_metrics(metrics, options.json)
        return 0

    verb.set_defaults(call=call)
