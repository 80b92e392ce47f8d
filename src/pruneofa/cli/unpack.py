"""The verb `unpack`."""

import argparse
from pathlib import Path

from pruneofa.cli.show import print_value


def describe(verb: argparse.ArgumentParser) -> None:
    """Convert a packed folder to a Hugging Face folder: bit-identical from fp32, dequantized values from int8."""
    verb.epilog = "example: pruneofa unpack packed model"
    verb.add_argument("packed", help="packed folder or hub id")
    verb.add_argument("out", type=Path, help="the Hugging Face folder; must not exist, or be empty")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.formats.unpack import unpack

        unpack(options.packed, options.out)
        print_value({"out": str(options.out)}, options.json)
        return 0

    verb.set_defaults(call=call)
