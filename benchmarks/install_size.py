"""What an installation takes on disk, by package: python benchmarks/install_size.py [PYTHON_OF_A_VENV]

Counted are the files that pip recorded, compiled bytecode included, without pip and setuptools.
"""

import json
import subprocess
import sys

PROGRAM = """
import importlib.metadata as metadata, json
def size(distribution):
    files = [file.locate() for file in distribution.files or ()]
    return sum(file.stat().st_size for file in files if file.is_file())
print(json.dumps({found.metadata["Name"]: size(found) for found in metadata.distributions()}))
"""


def main(python: str) -> None:
    """Print a line per package, the largest first, and the sum."""
    found = json.loads(subprocess.run([python, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout)
    sizes = {name: size for name, size in found.items() if name not in ("pip", "setuptools")}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:8.1f} MB  all {len(sizes)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else sys.executable)
