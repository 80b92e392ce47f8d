"""Print the speed table of docs/results.md: python benchmarks/speed_table.py benchmarks/records/RECORD/bench_*.json

Each file is what `pruneofa bench ... --json` printed.
"""

import argparse
import sys
from pathlib import Path

from pruneofa.bench.tables import read_records, speed_table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    sys.stdout.write(speed_table(read_records(parser.parse_args().records)))
