"""The command line, called in this process or as a program."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pruneofa import recipe
from pruneofa.cli import main as cli
from tests.small import small_recipe


class Said(NamedTuple):
    code: int
    out: str
    err: str


def program(*arguments: object, **environment: str) -> Said:
    """`pruneofa ARGUMENTS` as a program."""
    command = [sys.executable, "-m", "pruneofa", *map(str, arguments)]
    # Threads that wait for one another on a busy machine make tiny models a hundred times slower.
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    return Said(run.returncode, run.stdout, run.stderr)


@pytest.fixture
def call(capfd):
    """`pruneofa ARGUMENTS` in this process, which is seconds faster."""

    def called(*arguments: object) -> Said:
        capfd.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Said(code, *capfd.readouterr())

    return called


@pytest.fixture
def refused(call):
    """Call, and return the one line that says what is wrong with the input."""

    def line(*arguments: object, code: int = 2) -> str:
        said = call(*arguments)
        assert said.code == code, said.err
        assert said.out == ""
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("pruneofa: error: "), said.err
        return lines[0].removeprefix("pruneofa: error: ")

    return line


def write_recipe(root: Path, *overrides: str) -> Path:
    """The small recipe as a file, with the data and the model it names."""
    settings = small_recipe(root, *overrides)
    file = root / "recipe.yaml"
    file.write_text(recipe.dump(settings), encoding="utf-8")
    return file
