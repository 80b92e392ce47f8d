"""Check what a wheel installed: python tests/installed.py

It needs the base install and nothing else: no pytest, no compiler, no torch. [tool.cibuildwheel] runs it in the fresh
environment of each wheel.
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import pruneofa
from pruneofa import Engine, _native

PACKED = Path(__file__).parent / "golden" / "v1-int8"


def main() -> None:
    """Predict on every path that the CPU has, and run the command; an assertion fails if anything is wrong."""
    assert "site-packages" in Path(_native.__file__).parts, f"{_native.__file__} is not what a wheel installed"
    assert pruneofa.__version__ == importlib.metadata.version("pruneofa")
    paths = Engine.available_isas()
    assert paths[0] == "scalar"
    scores = {}
    for isa in paths:
        results = Engine.from_pretrained(PACKED, isa=isa, threads=2).predict(["a", "b a"])
        scores[isa] = np.array([list(result["scores"].values()) for result in results])
        assert scores[isa].shape == (2, 2) and np.allclose(scores[isa].sum(axis=1), 1, atol=1e-5), scores
        assert np.allclose(scores[isa], scores["scalar"], atol=0.02), scores
    command = [sys.executable, "-m", "pruneofa", "inspect", PACKED, "--engine"]
    assert b"pattern" in subprocess.run(command, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for verb, source, out in (("unpack", PACKED, "model"), ("pack", f"{folder}/model", "packed")):
            subprocess.run([sys.executable, "-m", "pruneofa", verb, source, f"{folder}/{out}"], check=True)
    sys.stdout.write(
        f"Python {sys.version.split()[0]}, {Path(_native.__file__).name}: {', '.join(paths)}; "
        f"torch: {importlib.util.find_spec('torch') is not None}, "
        f"compiler: {shutil.which('cc') or shutil.which('g++')}\n"
    )


if __name__ == "__main__":
    main()
