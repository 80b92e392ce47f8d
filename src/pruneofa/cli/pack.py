"""The verb `pack`."""

import argparse
from pathlib import Path

from pruneofa.cli.show import print_value, say, show_model


def describe(verb: argparse.ArgumentParser) -> None:
    """Pack a Hugging Face folder: store only the non-zeros and a bitmask with one bit per weight.

    The engine loads the packed folder directly. int8 keeps the scales of `pruneofa quantize` if there are any.
    Embedding tables become int8 too, even if they were float in training.
    """
    verb.epilog = "example: pruneofa pack runs/minilm-90/tasks/sst2/seed-0/transfer packed"
    verb.add_argument("folder", help="folder or hub id of the model; its zeros are the pattern")
    verb.add_argument("out", type=Path, help="the packed folder; must not exist, or be empty")
    choice = "int8 (default), or fp32, from which unpack restores every bit"
    verb.add_argument("--precision", choices=["int8", "fp32"], default="int8", help=choice)
    verb.add_argument(
        "--compress", action="store_true", help="compress the tensors with zstd: smaller, but slower to load"
    )
    verb.add_argument("--json", action="store_true", help="print the manifest as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.formats import packed
        from pruneofa.formats.files import user_path
        from pruneofa.formats.pack import difference_from_training, pack
        from pruneofa.run.lineage import check_lock

        check_lock(user_path(options.folder))  # a model of the hub is in no run's folder
        manifest = pack(options.folder, options.out, precision=options.precision, compress=options.compress)
        if note := difference_from_training(options.folder, options.precision):
            say(f"note: {note}", 0)
        print_value(manifest.to_json(), options.json, lambda: show_model(packed.inspect(options.out), layers=False))
        return 0

    verb.set_defaults(call=call)
