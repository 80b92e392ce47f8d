"""Check what a wheel installed: python tests/installed.py

It needs the base install and nothing else, so neither pytest nor a compiler nor torch. [tool.cibuildwheel] runs it in the
fresh environment of every wheel; docs/deploy.md shows it by hand.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

import pruneofa
from pruneofa import Engine

PACKED = Path(__file__).parent / "golden" / "v1-int8"


def main() -> None:
    """Predict on every path that the CPU has, and start the command; an assertion fails if anything is wrong."""
    installed = Path(pruneofa.__file__).parent
    assert not (installed.parents[1] / "pyproject.toml").exists(), (
        f"{installed} is a source tree, not what was installed"
    )
    assert pruneofa.__version__ == importlib.metadata.version("pruneofa")
    torch = importlib.util.find_spec("torch")
    paths = Engine.available_isas()
    assert paths[0] == "scalar"
    expected = None
    for isa in paths:
        engine = Engine.from_pretrained(PACKED, isa=isa, threads=2)
        found = engine.predict(["a", "b a"])
        scores = np.array([list(result["scores"].values()) for result in found])
        assert np.allclose(scores.sum(1), 1, atol=1e-5), scores
        expected = scores if expected is None else expected
        assert np.allclose(scores, expected, atol=0.02), (isa, scores, expected)
    command = [sys.executable, "-m", "pruneofa", "inspect", str(PACKED), "--engine", "--json"]
    assert b"pattern" in subprocess.run(command, check=True, capture_output=True).stdout
    extension = Path(pruneofa.__file__).with_name(
        "_native" + importlib.import_module("pruneofa._native").__file__.partition("_native")[2]
    )
    without = "without" if torch is None else "with"
    sys.stdout.write(f"{extension.name} on Python {sys.version.split()[0]} {without} torch: {', '.join(paths)}\n")


if __name__ == "__main__":
    main()
