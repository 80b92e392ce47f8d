"""The verb `run`."""

import argparse
from pathlib import Path

from pruneofa.cli.show import print_results, print_value, recipe_file, table


def describe(verb: argparse.ArgumentParser) -> None:
    """Carry out a recipe: finished stages are skipped, a broken one resumes."""
    verb.add_argument(
        "recipe", nargs="+", help="recipe file(s), later ones win key by key; or the name of a shipped one"
    )
    verb.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key (repeatable)")
    verb.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    verb.add_argument("--dry-run", action="store_true", help="print the stages, their cost, and what would be skipped")
    verb.add_argument("--redo", action="store_true", help="make stages again whose settings changed")
    verb.add_argument("--json", action="store_true", help="print results as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa import recipe

        loaded = recipe.load([recipe_file(name) for name in options.recipe], options.set)
        folder = options.out or Path("runs") / loaded.name
        if options.dry_run:
            from pruneofa.run.estimate import estimate

            rows = estimate(loaded, folder)
            print_value(rows, options.json, lambda: table(rows))
            return 0
        from pruneofa.run.run import run

        print_results(run(loaded, folder, redo=options.redo), folder, options.json)
        return 0

    verb.set_defaults(call=call)
