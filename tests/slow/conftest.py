"""The undisturbed result of every verb that writes."""

import os
import time
from pathlib import Path

import pytest

from tests.slow.children import VERBS, Child, command, contents
from tests.small import write_task, write_text
from tests.tiny import tiny_bert, write_model


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A folder with the inputs and the undisturbed result of every verb: {verb: (contents, seconds)}."""
    import torch

    import pruneofa.export.export
    import pruneofa.formats.pack
    import pruneofa.run.single
    import pruneofa.serve.batch  # noqa: F401 - imported once, before the forks

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("straight")
    before = Path.cwd()
    os.chdir(root)
    write_model(root / "model", tiny_bert())
    write_text(root / "text.jsonl")
    write_task(root / "task.csv")
    write_task(root / "validation.csv", rows=40, seed=1)
    results = {}
    for verb in VERBS:
        out = root / {"prune": "sparse", "predict": "predicted.csv"}.get(verb, verb)
        start = time.monotonic()
        code, said = Child(command(verb, out)).wait()
        assert code == 0, said
        results[verb] = contents(out), time.monotonic() - start
    yield results
    os.chdir(before)
