"""The verb `run`."""

import argparse
from pathlib import Path

from pruneofa.cli.show import print_results, print_value, recipe_file, shipped_recipes, table


def describe(verb: argparse.ArgumentParser) -> None:
    """Run a recipe, from plain text to model card: teacher, prune, and for each task transfer and quantize.

    The same command continues a run: finished stages are skipped, and an interrupted stage resumes from its last
    checkpoint. Results are in results.json, table.md and report.html of the run's folder.
    """
    verb.epilog = "example: pruneofa run minilm-90 --set data_root=DATA --dry-run"
    verb.add_argument(
        "recipe",
        nargs="+",
        help=f"files, or shipped recipes ({', '.join(shipped_recipes())}); later ones override earlier ones key by key",
    )
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a key, such as prune.final=0.85 (repeatable)",
    )
    verb.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    verb.add_argument(
        "--dry-run", action="store_true", help="only print the stages, their estimated time, and which would be skipped"
    )
    verb.add_argument("--redo", action="store_true", help="run stages again whose settings changed")
    verb.add_argument("--json", action="store_true", help="print results as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa import recipe

        loaded = recipe.load([recipe_file(name) for name in options.recipe], options.set)
        folder = options.out or Path("runs") / loaded.name
        if options.dry_run:
            from pruneofa.run.estimate import estimate

            rows = estimate(loaded, folder, redo=options.redo)
            print_value(rows, options.json, lambda: table(rows))
            return 0
        from pruneofa.run.run import run

        print_results(run(loaded, folder, redo=options.redo), folder, options.json)
        return 0

    verb.set_defaults(call=call)
