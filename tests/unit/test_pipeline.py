import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification

from pruneofa import pattern, recipe
from pruneofa.errors import InputError
from pruneofa.files import read_json
from pruneofa.train import pipeline
from pruneofa.train.estimate import estimate
from tests.small import small_recipe, write_task


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    settings = small_recipe(root / "data", "control={lr: [1e-4, 1e-3]}", "seeds=[0, 1]")
    return settings, root / "run", pipeline.run(settings, root / "run")


def stage_folders(folder):
    return sorted(file.parent for file in folder.rglob("stage.json"))


def test_results_cover_every_stage_variant_and_seed(done):
    settings, folder, results = done
    names = {"teacher", "prune", "control"} | {
        f"tasks/mine/seed-{seed}/{variant}" for seed in (0, 1) for variant in ("teacher", "transfer", "control")
    }
    assert set(results["stages"]) == names
    assert results == read_json(folder / "results.json")
    accuracy = results["tasks"]["mine"]["accuracy"]
    assert set(accuracy) == {"dense", "transfer", "control"}
    for variant in accuracy.values():
        values = [run["value"] for run in variant["runs"]]
        assert [run["seed"] for run in variant["runs"]] == [0, 1]
        assert variant["mean"] == pytest.approx(sum(values) / 2)
    assert results["stages"]["prune"]["tokens"] > 0 and results["stages"]["prune"]["seconds"] > 0
    assert results["sparsity"] == pytest.approx(0.9, abs=2e-3)
    for file in ("recipe.yaml", "run.json", "log.jsonl", "table.md", "report.html", "sparse/README.md"):
        assert (folder / file).exists(), file
    assert not (folder / ".work").exists()


def test_control_saw_the_prune_stages_tokens(done):
    _, folder, results = done
    tries = 2
    assert results["stages"]["control"]["tokens"] == tries * results["stages"]["prune"]["tokens"]
    assert read_json(folder / "control" / "metrics.json")["lr"] in (1e-4, 1e-3)


def test_every_folder_is_an_ordinary_one(done):
    _, folder, _ = done
    for stage in stage_folders(folder):
        kind = AutoModelForSequenceClassification if "tasks" in stage.parts else AutoModelForPreTraining
        model, info = kind.from_pretrained(stage, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], stage
        logits = [model(input_ids=torch.tensor([[2, 7, 8, 3]]))[0] for model in (model, kind.from_pretrained(stage))]
        assert torch.equal(*logits)
        assert {p.suffix for p in stage.iterdir()} <= {".json", ".safetensors", ".md", ".svg"}
        with safe_open(stage / "model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if "teacher" in name or "mask" in name]  # noqa: SIM118


def test_pruned_weights_are_plus_zero_and_stay_so(done):
    settings, folder, _ = done
    for task in folder.glob("tasks/*/seed-*/transfer"):
        found = pattern.verify(str(folder / "sparse"), str(task))
        assert found["ok"] and found["extra_zeros"] == 0
        for _, weight in pattern.read_weights(str(task)):
            assert not (torch.from_numpy(weight.copy()).signbit() & (torch.from_numpy(weight.copy()) == 0)).any()
    assert pipeline.verify_run(settings, folder) == 2


def test_own_labels_reach_the_config(done):
    _, folder, _ = done
    config = read_json(folder / "tasks/mine/seed-0/transfer/config.json")
    assert config["id2label"] == {"0": "bad", "1": "good"}


def test_nothing_published_names_a_place_of_this_machine(done):
    _, folder, _ = done
    root = str(folder.parent)
    for file in ("results.json", "table.md", "report.html", "sparse/README.md", "log.jsonl", "run.json"):
        assert root not in (folder / file).read_text(), file


def test_running_again_does_nothing(done):
    settings, folder, results = done
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("model.safetensors")}
    assert pipeline.run(settings, folder) == results
    assert times == {file: file.stat().st_mtime_ns for file in folder.rglob("model.safetensors")}


def test_dry_run_says_what_would_be_skipped(done):
    settings, folder, _ = done
    before = sorted(folder.rglob("*"))
    rows = estimate(settings, folder)
    assert {row["status"] for row in rows[:-1]} == {"done"} and rows[-1]["minutes"] == 0
    rows = estimate(settings.model_copy(update={"seeds": [0, 2]}), folder)
    assert {row["stage"] for row in rows if row["status"] == "run"} == {
        f"tasks/mine/seed-2/{variant}" for variant in ("teacher", "transfer", "control")
    }
    assert sorted(folder.rglob("*")) == before


def test_changed_settings_need_redo_and_touch_only_what_depends_on_them(done, tmp_path):
    import shutil

    settings, folder, _ = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    changed = settings.model_copy(deep=True)
    changed.tasks["mine"].temperature = 3.0
    with pytest.raises(InputError, match=r"tasks/mine/seed-0/transfer.*--redo"):
        pipeline.run(changed, copy)
    teacher = (copy / "tasks/mine/seed-0/teacher/stage.json").stat().st_mtime_ns
    transfer = read_json(copy / "tasks/mine/seed-0/transfer/stage.json")
    pipeline.run(changed, copy, redo=True)
    assert (copy / "tasks/mine/seed-0/teacher/stage.json").stat().st_mtime_ns == teacher
    assert read_json(copy / "tasks/mine/seed-0/transfer/stage.json")["fingerprint"] != transfer["fingerprint"]
    assert not list(copy.rglob("*.old"))


def test_another_recipes_folder_is_refused(done, tmp_path):
    settings, folder, _ = done
    with pytest.raises(InputError, match="holds the run 'small', this recipe is 'other'"):
        pipeline.run(settings.model_copy(update={"name": "other"}), folder)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty and not a run's folder"):
        pipeline.run(settings, tmp_path)


def test_a_sparse_model_is_a_start(done, tmp_path):
    _, folder, _ = done
    data = write_task(tmp_path / "t.csv")
    spec = recipe.Task(data=str(data), text="sentence", label="verdict", epochs=1, max_length=32, kd=0, hard=1)
    options = {"data_root": None, "seed": 0, "precision": "fp32"}
    out = tmp_path / "out"
    metrics = pipeline.transfer(str(folder / "sparse"), out, "mine", spec.resolved("mine"), **options)
    assert set(metrics) == {"accuracy", "f1"}
    assert pattern.verify(str(folder / "sparse"), str(out))["ok"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t.csv"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="was not made by this command"):
        pipeline.transfer(str(folder / "sparse"), tmp_path / "mine", "mine", spec.resolved("mine"), **options)


def test_prune_alone(tmp_path):
    settings = small_recipe(tmp_path / "data", "prune.pattern=4x1", "prune.final=0.75")
    metrics = pipeline.prune(settings.model_copy(update={"tasks": {}}), tmp_path / "out")
    assert metrics["loss"] > 0
    assert pattern.inspect(str(tmp_path / "out"))["encoder"] == pytest.approx(0.75, abs=5e-3)
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["settings"]["pattern"] == "4x1"
    assert (tmp_path / "out-teacher" / "model.safetensors").exists()
