"""The verb `table`."""

import argparse
import sys
from pathlib import Path

from pruneofa.cli.show import print_value, printable_lines


def describe(verb: argparse.ArgumentParser) -> None:
    """Print one Markdown table of the results of several runs, in the layout of the paper's table.

    Rows are models and variants; columns are tasks. A run's folder or its results.json can be given.
    """
    verb.epilog = "example: pruneofa table runs/minilm-80 runs/minilm-90"
    verb.add_argument("results", nargs="+", type=Path, help="results.json files, or the folders of runs")
    verb.add_argument("--json", action="store_true", help="print the results as one JSON list")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.report.schema import read_results
        from pruneofa.report.table import write_table

        results = [read_results(path) for path in options.results]
        print_value(results, options.json, lambda: sys.stdout.write(printable_lines(write_table(results))))
        return 0

    verb.set_defaults(call=call)
