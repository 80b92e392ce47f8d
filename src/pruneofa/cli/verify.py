"""The verb `verify`."""

import argparse
import sys

from pruneofa.cli.show import print_value


def describe(verb: argparse.ArgumentParser) -> None:
    """Prove that every zero of BASE's pattern is exactly zero in DERIVED; exit 1 if not."""
    verb.add_argument("base", help="the sparse pre-trained model")
    verb.add_argument("derived", help="a model made from it")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.formats import pattern

        found = pattern.verify(options.base, options.derived)

        def show() -> None:
            for layer in found["revived"]:
                sys.stdout.write(f"revived: {layer['layer']}: {layer['count']} weights\n")
            for layer in found["missing"]:
                sys.stdout.write(f"missing: {layer}\n")
            if found["missing_pooler"]:
                sys.stdout.write("the pooler is missing in the derived model (question-answering heads drop it)\n")
            sys.stdout.write(f"{'ok' if found['ok'] else 'FAILED'}: {found['extra_zeros']} zeros more than the base\n")

        print_value(found, options.json, show)
        return 0 if found["ok"] else 1

    verb.set_defaults(call=call)
