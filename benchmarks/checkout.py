"""Another source tree, for the benchmarks that compare two: each has been installed, by `make install` in it.

Its own interpreter runs it. PYTHONPATH would not do: an editable install of one tree wins over it, in silence.
"""

import sys
from pathlib import Path


def interpreter(checkout: Path) -> str:
    """The Python that has the package of this tree."""
    return str(checkout / ".venv/bin/python")


def check_loaded(file: str, checkout: Path) -> None:
    """Exit unless `file`, where a process found the package, is in this tree."""
    if not Path(file).is_relative_to(checkout.resolve()):
        sys.exit(f"{checkout}: {file} was loaded instead")
