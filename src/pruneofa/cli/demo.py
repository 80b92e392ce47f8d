"""The verb `demo`."""

import argparse
import sys
from pathlib import Path

from pruneofa.cli.show import print_value, recipe_file, table


def describe(verb: argparse.ArgumentParser) -> None:
    """Run every stage in minutes on real text: the documentation of the installed Python and its packages.

    The demo prunes a MiniLM encoder once, in one step where the published method prunes gradually, fine-tunes it dense
    and sparse with the pattern locked, quantizes it to int8 and packs it. At the end it prints accuracy, size and
    latency of each model, beside a bag of words. The same command resumes it after Ctrl-C.
    """
    verb.epilog = "example: pruneofa demo --out runs/demo"
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run's folder (default: runs/demo)")
    verb.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a key of recipes/demo.yaml (repeatable)"
    )
    verb.add_argument("--redo", action="store_true", help="run stages again whose settings changed")
    verb.add_argument("--json", action="store_true", help="print results as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.run import demo

        results = demo.run_demo(options.out, recipe_file("demo"), options.set, redo=options.redo)
        print_value(results, options.json, lambda: table(demo.closing_rows(results)))
        if not options.json:
            sys.stdout.write(demo.closing_notes(results, options.out))
        return 0

    verb.set_defaults(call=call)
