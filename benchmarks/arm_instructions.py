"""Instructions per multiply-add of the ARM paths, counted by qemu: no ARM machine was timed.

A layer of 768 x 768 and 128 tokens, sums only for int8; dense without zeros, the others with 90 % of zeros, by4 in
blocks of four outputs. Only kept weights count as multiply-adds, so a sparse layout needs less than the dense one where
its figure is less than ten times as large. The same instructions cost different times on different processors.

    cmake -S . -B build/arm -DPRUNEOFA_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static && cmake --build build/arm
    python benchmarks/arm_instructions.py build/arm/paths_check
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import children

CASES = ("dense", "words", "gathered", "by4", "fp32 dense", "fp32 words")
PLUGIN = Path(__file__).with_name("count_instructions.c")


def main() -> None:
    """Print a table: one row per layout, one column per path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", type=Path, help="paths_check, built for aarch64")
    program = parser.parse_args().program
    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder) / "count.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", plugin, PLUGIN], check=True)

        def counted(path: str, layout: str, repeats: int) -> tuple[int, int]:
            command = ["qemu-aarch64", "-cpu", "max", "-plugin", plugin, program, "multiply", path, layout, repeats]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
            return int(done.stderr), int(done.stdout)

        print("| layout | " + " | ".join(paths := ("scalar", "neon", "neon_i8mm")) + " |\n|---|---|---|---|")
        for case in CASES:
            cells = []
            for path in paths:
                if path == "scalar" and case in ("gathered", "by4"):
                    cells.append("-")
                    continue
                (once, products), (thrice, _) = (counted(path, case, repeats) for repeats in (1, 3))
                cells.append(f"{(thrice - once) / 2 / products:.4f}")
            print(f"| {case} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    children.run(main)
