"""The verb `evaluate`."""

import argparse

from pruneofa.cli.options import EVALUATED, add_fields, read_task
from pruneofa.cli.show import print_value


def describe(verb: argparse.ArgumentParser) -> None:
    """Metrics of any task model's folder: a packed one by the engine, another one by torch or by the engine.

    Task data is read and tokenized by the train extra, for the engine too: pip install '.[train]'.
    """
    from pruneofa import recipe

    verb.usage = "pruneofa evaluate PATH (--task T | --data FILE --text A [B] --label L) [options]"
    verb.epilog = "example: pruneofa evaluate runs/minilm-90/tasks/sst2/seed-0/transfer --task sst2 --data sst2"
    verb.add_argument("path", help="folder or hub id of a task model")
    verb.add_argument("--task", metavar="T", help="sst2, mnli, qnli, qqp or squad; or a name for your own --data")
    add_fields(verb, recipe.Task, "", only=EVALUATED)
    verb.add_argument("--data-root", help="relative data paths are resolved here")
    group = verb.add_argument_group("engine")
    group.add_argument("--engine", action="store_true", help="by the engine, as packed folders are in any case")
    choice = "of the engine (default int8), or fp32 instead of the int8 that torch simulates of a quantized folder"
    group.add_argument("--precision", choices=["int8", "fp32"], help=choice)
    group.add_argument("--threads", type=int, metavar="N", help="of the engine (default: as it chooses)")
    group.add_argument("--isa", metavar="ISA", help="hold the engine to amx, avx512vnni, avxvnni, avx2 or scalar")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.train.evaluate import evaluate

        name, spec = read_task(options)
        engine = {key: getattr(options, key) for key in ("engine", "precision", "threads", "isa")}
        print_value(evaluate(options.path, name, spec, data_root=options.data_root, whole=True, **engine), options.json)
        return 0

    verb.set_defaults(call=call)
