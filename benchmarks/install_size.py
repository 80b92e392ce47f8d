"""Disk space of an installation, by package: python benchmarks/install_size.py [PYTHON_OF_A_VENV]

It counts the files that pip recorded, without pip and setuptools. Bytecode, which Python compiles from them, is counted
apart (`pip install --no-compile` leaves it out).
"""

import argparse
import json
import subprocess
import sys

import children

PROGRAM = """
import importlib.metadata as metadata, json
def sizes(distribution):
    files = [file.locate() for file in distribution.files or ()]
    files = [file for file in files if file.is_file()]
    bytecode = sum(file.stat().st_size for file in files if file.suffix == ".pyc")
    return sum(file.stat().st_size for file in files) - bytecode, bytecode
print(json.dumps({found.metadata["Name"]: sizes(found) for found in metadata.distributions()}))
"""


def main() -> None:
    """Print a line per package, the largest first, and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", default=sys.executable, metavar="PYTHON_OF_A_VENV")
    python = parser.parse_args().python
    found = json.loads(subprocess.run([python, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout)
    sizes = {name: size for name, size in found.items() if name not in ("pip", "setuptools")}
    print("  wheels  bytecode, MB")
    for name, (files, bytecode) in sorted(sizes.items(), key=lambda item: -sum(item[1])):
        print(f"{files / 1e6:8.1f}  {bytecode / 1e6:8.1f}  {name}")
    totals = [sum(size[part] for size in sizes.values()) / 1e6 for part in (0, 1)]
    print(f"{totals[0]:8.1f}  {totals[1]:8.1f}  {sum(totals):.1f} in all, {len(sizes)} packages")


if __name__ == "__main__":
    children.run(main)
