"""What results/collect.py copies of a run."""

import shutil
import subprocess
import sys
from pathlib import Path

from pruneofa import recipe
from tests.report.example_run import HOME, example_recipe

SCRIPT = Path(__file__).parents[2] / "results" / "collect.py"


def test_the_recipe_of_a_run_is_copied_without_places(tmp_path):
    values = example_recipe(model="~/models/mini", prune={"pattern": "2:4", "final": 0.5, "skip": [r"\.layer\.0\."]})
    (tmp_path / "run" / "sparse").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(values))
    (tmp_path / "run" / "sparse" / "stage.json").write_text("{}")
    (tmp_path / "results").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "results")
    subprocess.run([sys.executable, script, tmp_path / "run"], check=True, capture_output=True)
    copy = tmp_path / "results" / "minilm-90"
    text = (copy / "recipe.yaml").read_text()
    assert HOME not in text and "~" not in text and "../" not in text
    loaded = recipe.load([copy / "recipe.yaml"])
    assert loaded.model == "mini" and loaded.data_root is None
    assert loaded.prune is not None and loaded.prune.pattern == "2:4" and loaded.prune.skip == [r"\.layer\.0\."]
    assert (copy / "sparse" / "stage.json").read_text() == "{}"
