"""The undisturbed result of every verb that writes."""

import os
import time
from pathlib import Path

import pytest

from tests.slow.children import VERBS, Child, command, contents
from tests.small import write_task, write_text
from tests.tiny import tiny_bert, write_model

# The verb whose result another one reads.
NEEDS = {"transfer": "prune", "quantize": "transfer", "pack": "transfer", "unpack": "pack", "export": "quantize",
         "predict": "pack", "predict-folder": "pack"}  # fmt: skip


class Straight(dict):
    """{verb: (contents of its result, seconds it took)}; made when it is first asked for."""

    def __missing__(self, verb):
        if verb in NEEDS:
            self[NEEDS[verb]]
        out = Path({"prune": "sparse", "predict": "predicted.csv"}.get(verb, verb)).absolute()
        start = time.monotonic()
        code, said = Child(command(verb, out)).wait()
        assert code == 0, said
        self[verb] = contents(out), time.monotonic() - start
        return self[verb]


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """The working folder holds the inputs, and the undisturbed result of every verb."""
    import torch

    import pruneofa.export.export
    import pruneofa.formats.pack
    import pruneofa.run.single
    import pruneofa.serve.batch  # noqa: F401 - imported once, before the forks

    assert NEEDS.keys() | {"prune"} == VERBS.keys()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("straight")
    before = Path.cwd()
    os.chdir(root)
    write_model(root / "model", tiny_bert())
    write_text(root / "text.jsonl")
    write_task(root / "task.csv")
    write_task(root / "validation.csv", rows=40, seed=1)
    yield Straight()
    os.chdir(before)
