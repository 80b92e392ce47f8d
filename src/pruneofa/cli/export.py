"""The verb `export`."""

import argparse
import json
import sys

from pruneofa.cli.options import EVALUATED, add_fields, read_task
from pruneofa.cli.show import printable_lines
from pruneofa.errors import printable


def describe(verb: argparse.ArgumentParser) -> None:
    """Export a model for another runtime, run it there, and compare its outputs with torch.

    The export fails with exit 1 and writes no folder if a zero is lost, a layer of an int8 export does not run in int8,
    the outputs differ from those of torch, or a metric of --task or --data loses more than 0.2 points.
    """
    from pruneofa import recipe

    verb.usage = "pruneofa export FOLDER OUT --to FORMAT [--task T | --data FILE --text A [B] --label L] [options]"
    verb.epilog = "example: pruneofa export runs/minilm-90/tasks/sst2/seed-0/quantize onnx --to onnx --task sst2"
    verb.add_argument("folder", help="Hugging Face folder or hub id of the model")
    verb.add_argument("out", help="the new folder; must not exist, or be empty")
    formats = ["onnx", "openvino", "compressed-tensors"]
    verb.add_argument(
        "--to", required=True, choices=formats, help="the format; each needs its extra: onnx, openvino or compressed"
    )
    choice = "int8 with the scales of `pruneofa quantize` (default if the folder has scales), or fp32"
    verb.add_argument("--precision", choices=["int8", "fp32"], help=choice)
    task = "also compare metrics: sst2, mnli, qnli, qqp or squad; or a name for your own --data"
    verb.add_argument("--task", metavar="T", help=task)
    add_fields(verb, recipe.Task, "", only=EVALUATED)
    verb.add_argument("--data-root", help="folder to which relative data paths refer")
    verb.add_argument("--json", action="store_true", help="print the report as JSON")

    def call(options: argparse.Namespace) -> int:
        name, spec = read_task(options) if options.task or options.data else (None, None)
        from pruneofa.export import export as module  # torch, which takes seconds: a wrong option is refused before
        from pruneofa.formats.files import user_path
        from pruneofa.run.lineage import check_lock

        given = {"to": options.to, "precision": options.precision, "data_root": options.data_root}
        check_lock(user_path(options.folder))  # a model of the hub is in no run's folder
        try:
            report = module.export(options.folder, options.out, name=name, spec=spec, **given)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("nothing was written") from None
        sys.stdout.write(
            json.dumps(report, indent=2) + "\n" if options.json else printable_lines(module.summary(report))
        )
        for failure in report["failures"]:
            sys.stderr.write(f"pruneofa: failed: {printable(failure)}\n")
        return 1 if report["failures"] else 0

    verb.set_defaults(call=call)
