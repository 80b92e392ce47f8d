"""Print the speed table of docs/results.md: python benchmarks/speed_table.py benchmarks/records/RECORD/bench_*.json

Each file is what `pruneofa bench ... --json` printed.
"""

import sys
from pathlib import Path

from pruneofa.bench.tables import read_records, speed_table

if __name__ == "__main__":
    sys.stdout.write(speed_table(read_records(map(Path, sys.argv[1:]))))
