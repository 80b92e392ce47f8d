"""A pattern lock that was broken by hand is found in a run's own folders, and nothing is said of other folders."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pruneofa import recipe
from pruneofa.cli.main import main
from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.run.lineage import check_lock, sparse_here, sparse_of_run
from tests.golden import source
from tests.small import small_recipe

QUERY = "encoder.layer.0.attention.self.query.weight"
SEED = "tasks/mine/seed-0"
MISSING = "its run names the sparse model {}, which is no folder with safetensors here"


@pytest.fixture
def run(tmp_path):
    """The folders that a run leaves, all of one model."""
    root = tmp_path / "run"
    source(root / "sparse")
    (root / "recipe.yaml").write_text(recipe.dump(small_recipe(tmp_path / "data")))
    for variant in ("transfer", "quantize", "teacher"):
        folder = shutil.copytree(root / "sparse", root / SEED / variant)
        write_record(folder, "dense" if variant == "teacher" else variant)
    return root


def write_record(folder, variant, task="mine"):
    (folder / "stage.json").write_text(json.dumps({"task": task, "seed": 0, "variant": variant}))


def revive(folder, name=QUERY):
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[f"bert.{name}"]
    weight[tuple(index[0] for index in (weight == 0).nonzero())] = 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", [QUERY, POOLER_WEIGHT])
@pytest.mark.parametrize("variant", ["transfer", "quantize"])
@pytest.mark.parametrize("verb", [("pack",), ("pack", "--precision", "fp32"), ("export", "--to", "openvino")])
def test_a_zero_that_was_revived_by_hand_is_found(run, variant, verb, name, tmp_path, capsys):
    check_lock(run / SEED / variant)
    revive(run / SEED / variant, name)
    assert main([verb[0], str(run / SEED / variant), str(tmp_path / "out"), *verb[1:]]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"{variant}: lost the pattern of .*sparse: {name}: 1 revived; make it again", said)
    assert not (tmp_path / "out").exists()


def test_nothing_is_said_of_folders_without_a_lock(run, tmp_path):
    shutil.copytree(run / SEED / "transfer", tmp_path / "elsewhere")
    for folder in (tmp_path / "elsewhere", run / SEED / "teacher", run / "sparse"):
        revive(folder)
        check_lock(folder)
        assert sparse_of_run(folder) is None


def test_a_folder_near_the_root_of_the_disk_has_no_run_above_it():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # shallower than a stage's folder in a run
        write_record(Path(folder), "transfer")
        check_lock(Path(folder))
        assert sparse_of_run(Path(folder)) is None


def test_where_the_sparse_model_is(run):
    folder = run / SEED / "transfer"
    assert sparse_of_run(folder) == str(run / "sparse")
    control = shutil.copytree(folder, folder.with_name("control"))
    write_record(control, "control")
    assert sparse_of_run(control) is None  # it is gone, and nothing to compare with
    (run / "control").mkdir()
    assert sparse_of_run(control) == str(run / "control")
    write_record(folder, "transfer", task="other")  # not where that stage's folder is
    assert sparse_of_run(folder) is None
    write_record(folder, "prune", task=None)
    assert sparse_of_run(folder) is None
    (folder / "stage.json").write_text('{"task": "mine"}')
    sparse, why = sparse_here(folder)
    assert sparse is None and "stage.json: no seed, variant, which every stage writes; restore the file" in str(why)


@pytest.mark.parametrize("model", ["here", "org/name"])
def test_a_run_from_a_sparse_model_is_compared_where_that_is_a_folder(run, model, tmp_path):
    (run / "sparse").rename(tmp_path / "here")
    model = str(tmp_path / model) if model == "here" else model
    settings = {"name": "mine", "model": model, "model_is_sparse": True}
    (run / "recipe.yaml").write_text(recipe.dump(recipe.validate(recipe.Recipe, settings)))
    revive(run / SEED / "transfer")
    assert sparse_of_run(run / SEED / "transfer") == model
    if model == "org/name":
        check_lock(run / SEED / "transfer")
        assert sparse_here(run / SEED / "transfer") == (None, MISSING.format(model))
        return
    with pytest.raises(InputError, match="1 revived"):
        check_lock(run / SEED / "transfer")


def test_a_run_that_was_started_elsewhere_or_by_a_later_version_is_not_compared(run, tmp_path, monkeypatch):
    folder = run / SEED / "transfer"
    assert sparse_here(folder) == (str(run / "sparse"), None)
    (run / "sparse").rename(tmp_path / "here")
    settings = {"name": "mine", "model": "here", "model_is_sparse": True}
    (run / "recipe.yaml").write_text(recipe.dump(recipe.validate(recipe.Recipe, settings)))
    monkeypatch.chdir(tmp_path)  # where the run may have been started, or not
    assert sparse_here(folder) == (None, MISSING.format("here"))
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "later: 1\n")
    sparse, why = sparse_here(folder)
    assert sparse is None and "later" in str(why)
    check_lock(folder)


def test_a_weight_that_is_no_number_is_named_and_not_called_a_lost_pattern(run):
    file = run / SEED / "transfer" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(QUERY))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"transfer: {QUERY} has 1 NaN or infinite weights; train again"):
        check_lock(run / SEED / "transfer")


def test_it_needs_no_torch(run):
    program = (
        "import sys; from pathlib import Path; from pruneofa.run.lineage import check_lock; "
        f"check_lock(Path({str(run / SEED / 'transfer')!r})); "
        "print(sorted({'torch', 'transformers', 'pruneofa.train'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
