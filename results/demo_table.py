"""Print the table that `pruneofa demo` ends with, for README.md.

python results/demo_table.py results/demo/results.json
"""

import sys
from pathlib import Path

from pruneofa.formats.files import read_json
from pruneofa.report.deployment import latency_setting, markdown
from pruneofa.run.demo import closing_rows


def demo_table(file: Path) -> str:
    """The closing rows of one run as Markdown, and how time was measured."""
    results = read_json(file)
    rows = closing_rows(results)
    return f"{markdown((list(rows[0]), [list(row.values()) for row in rows]))}\n{latency_setting(results)}\n"


if __name__ == "__main__":
    sys.stdout.write(demo_table(Path(sys.argv[1])))
