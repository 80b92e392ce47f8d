"""The verb `verify`."""

import argparse
import sys

from pruneofa.cli.show import print_value
from pruneofa.errors import printable


def describe(verb: argparse.ArgumentParser) -> None:
    """Check that every zero of BASE's pattern is exactly zero in DERIVED; exit 1 if not.

    The encoder's linear weights are compared, and the pooler if both models have one.
    """
    verb.epilog = "example: pruneofa verify runs/minilm-90/sparse runs/minilm-90/tasks/sst2/seed-0/transfer"
    verb.add_argument("base", help="folder or hub id of the sparse pre-trained model")
    verb.add_argument("derived", help="folder or hub id of a model derived from it")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.formats import pattern

        found = pattern.verify(options.base, options.derived)

        def show() -> None:
            for layer in found["revived"]:
                sys.stdout.write(f"revived: {printable(layer['layer'])}: {layer['count']} weights\n")
            for layer in found["missing"]:
                sys.stdout.write(f"missing: {printable(layer)}\n")
            if found["missing_pooler"]:
                sys.stdout.write("the derived model has no pooler (question-answering models have none)\n")
            sys.stdout.write(f"{'ok' if found['ok'] else 'FAILED'}: {found['extra_zeros']} more zeros than the base\n")

        print_value(found, options.json, show)
        return 0 if found["ok"] else 1

    verb.set_defaults(call=call)
