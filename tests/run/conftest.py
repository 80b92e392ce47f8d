import shutil

import pytest

from pruneofa.run.run import run
from tests.small import small_recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The recipe and the folder of a finished run, which no test changes."""
    root = tmp_path_factory.mktemp("done")
    settings = small_recipe(root / "data")
    run(settings, root / "run")
    return settings, root / "run"


@pytest.fixture
def copy(done, tmp_path):
    """Another folder of that run, to be changed."""
    return shutil.copytree(done[1], tmp_path / "run")
