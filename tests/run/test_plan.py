import json
import shutil
from datetime import UTC, datetime

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification, BertModel

from pruneofa import recipe
from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.files import read_json
from pruneofa.formats.verify import verify
from pruneofa.run import results as run_results
from pruneofa.run import single
from pruneofa.run.checks import check
from pruneofa.run.estimate import estimate
from pruneofa.run.events import LOG, read_events
from pruneofa.run.folder import RUN, exclusive, refuse_changes
from pruneofa.run.inputs import Inputs
from pruneofa.run.names import StageId
from pruneofa.run.plan import plan
from pruneofa.run.results import verify_run
from pruneofa.run.run import run
from tests.small import small_recipe, write_task
from tests.tiny import half_pruned, tiny_bert, write_model


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    settings = small_recipe(root / "data", "control={lr: [1e-4, 1e-3]}", "seeds=[0, 1]")
    return settings, root / "run", run(settings, root / "run")


def steps_of(settings, folder):
    return plan(settings, Inputs(settings), folder)


def test_each_seed_learns_from_the_dense_model_that_the_task_names_for_it(done, tmp_path):
    """As with dense models that are here already, of an earlier run: they are evaluated, not trained again."""
    settings, folder, before = done
    sparse = {"model_is_sparse": True, "model": str(folder / "sparse")}
    again = settings.model_copy(update=sparse | {"teacher": None, "prune": None, "control": False}, deep=True)
    again.tasks["mine"].teacher = f"{folder}/tasks/mine/seed-{{seed}}/teacher"
    found = run(again, tmp_path / "again")["tasks"]["mine"]["accuracy"]
    for variant in ("dense", "transfer"):
        now, then = found[variant]["runs"], before["tasks"]["mine"]["accuracy"][variant]["runs"]
        assert [(run["seed"], run["value"]) for run in now] == [(run["seed"], run["value"]) for run in then]
    for seed in (0, 1):
        model = f"tasks/mine/seed-{seed}/transfer/model.safetensors"
        assert (tmp_path / "again" / model).read_bytes() == (folder / model).read_bytes()
    with pytest.raises(InputError, match=r"seed-2/teacher: no such folder"):
        estimate(again.model_copy(update={"seeds": [0, 2]}), tmp_path / "other")


def test_a_model_that_was_given_is_never_replaced(done, tmp_path):
    """The folder of a dense model that is given has a record only; --redo would put that in the model's place."""
    settings, folder, _ = done
    before = sorted(path.name for path in (folder / "tasks/mine/seed-0/teacher").iterdir())
    given = settings.model_copy(deep=True)
    given.tasks["mine"].teacher = f"{folder}/tasks/mine/seed-{{seed}}/teacher"
    for redo in (False, True):
        with pytest.raises(InputError, match=r"seed-0/teacher: is what tasks/mine/seed-0/teacher would replace here; "):
            run(given, folder, redo=redo)
    with pytest.raises(InputError, match="would replace here"):
        estimate(given, folder, redo=True)
    assert sorted(path.name for path in (folder / "tasks/mine/seed-0/teacher").iterdir()) == before
    one = settings.model_copy(
        update={"tasks": {}, "control": False, "quantize": None, "model": str(tmp_path / "s-teacher")}
    )
    shutil.copytree(folder / "teacher", tmp_path / "s-teacher")
    with pytest.raises(InputError, match="s-teacher: is what teacher would replace here; choose another OUT"):
        single.prune(one, tmp_path / "s", redo=True)


def stage_folders(folder):
    return sorted(file.parent for file in folder.rglob("stage.json"))


def test_results_cover_every_stage_variant_and_seed(done):
    _, folder, results = done
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
    for name, variant in accuracy.items():
        if name == "dense":
            assert "lost" not in variant
            continue
        assert variant["lost"]["mean"] == pytest.approx(accuracy["dense"]["mean"] - variant["mean"], abs=1e-4)
        assert 0 <= variant["lost"]["standard_error"] < 50
    assert all("thread" in costs["hardware"] for costs in results["stages"].values())
    assert "| Lost against dense, points |" in (folder / "table.md").read_text()
    for file in ("recipe.yaml", "run.json", "log.jsonl", "table.md", "report.html", "sparse/README.md"):
        assert (folder / file).exists(), file
    assert not (folder / ".work").exists()


def test_control_saw_the_prune_stages_tokens(done):
    _, folder, results = done
    assert results["stages"]["control"]["tokens"] == results["stages"]["prune"]["tokens"]
    metrics = read_json(folder / "control" / "metrics.json")
    assert metrics["lr"] in (1e-4, 1e-3)
    assert metrics["loss"] == min(metrics["loss_lr_0.0001"], metrics["loss_lr_0.001"])
    assert metrics["tokens_of_all_rates"] == 2 * results["stages"]["prune"]["tokens"]


def test_every_folder_is_an_ordinary_one(done):
    _, folder, _ = done
    for stage in stage_folders(folder):
        kind = AutoModelForSequenceClassification if "tasks" in stage.parts else AutoModelForPreTraining
        model, info = kind.from_pretrained(stage, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], stage
        logits = [model(input_ids=torch.tensor([[2, 7, 8, 3]]))[0] for model in (model, kind.from_pretrained(stage))]
        assert torch.equal(*logits)
        assert {p.suffix for p in stage.iterdir()} <= {".json", ".safetensors", ".npz", ".md", ".svg"}
        with safe_open(stage / "model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if "teacher" in name or "mask" in name]  # noqa: SIM118


def test_pruned_weights_are_plus_zero_and_stay_so(done):
    settings, folder, _ = done
    for task in folder.glob("tasks/*/seed-*/transfer"):
        found = verify(str(folder / "sparse"), str(task))
        assert found["ok"] and found["extra_zeros"] == 0
        for _, weight in pattern.read_weights(str(task)):
            assert not (torch.from_numpy(weight.copy()).signbit() & (torch.from_numpy(weight.copy()) == 0)).any()
    assert verify_run(settings, folder, plan(settings, Inputs(settings), folder)) == 2


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
    assert run(settings, folder) == results
    assert times == {file: file.stat().st_mtime_ns for file in folder.rglob("model.safetensors")}


def test_the_card_says_with_what_and_when_the_model_was_made_not_when_it_was_written(done, monkeypatch):
    settings, folder, results = done
    card = (folder / "sparse" / "README.md").read_text()
    (made,) = [event for event in read_events(folder / LOG) if (event["event"], event["stage"]) == ("done", "prune")]
    assert f"| Date | {datetime.fromtimestamp(made['time'], UTC).date()} |" in card
    monkeypatch.setattr(run_results, "versions", lambda: {"pruneofa": "9.9"})
    monkeypatch.setattr(run_results, "_date", lambda events, date=run_results._date: date([*events, later]))
    later = {"time": made["time"] + 1e8, "event": "written", "stage": None}
    assert run(settings, folder) == results and (folder / "sparse" / "README.md").read_text() == card


def test_dry_run_says_what_would_be_skipped(done):
    settings, folder, _ = done
    before = sorted(folder.rglob("*"))
    rows = estimate(settings, folder)
    assert {row["status"] for row in rows[:-1]} == {"done"} and rows[-1]["minutes"] == 0
    rows = estimate(settings.model_copy(update={"seeds": [0, 2]}), folder)
    stages = {f"tasks/mine/seed-2/{variant}" for variant in ("teacher", "transfer", "control")}
    made = {row["stage"]: row for row in rows if row["status"] == "run"}
    assert set(made) == stages | {f"evaluate {stage}" for stage in stages}
    assert made["evaluate tasks/mine/seed-2/transfer"]["tokens"] > 0
    assert sorted(folder.rglob("*")) == before


def test_changed_settings_need_redo_and_touch_only_what_depends_on_them(done, tmp_path):
    import shutil

    settings, folder, _ = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    changed = settings.model_copy(deep=True)
    changed.tasks["mine"].temperature = 3.0
    with pytest.raises(InputError, match=r"tasks/mine/seed-0/transfer.*--redo"):
        run(changed, copy)
    teacher = (copy / "tasks/mine/seed-0/teacher/stage.json").stat().st_mtime_ns
    transfer = read_json(copy / "tasks/mine/seed-0/transfer/stage.json")
    run(changed, copy, redo=True)
    assert (copy / "tasks/mine/seed-0/teacher/stage.json").stat().st_mtime_ns == teacher
    assert read_json(copy / "tasks/mine/seed-0/transfer/stage.json")["fingerprint"] != transfer["fingerprint"]
    assert not list(copy.rglob("*pruneofa-*"))


def test_dropout_of_a_task_is_the_sparse_models_only(tmp_path):
    settings = small_recipe(tmp_path / "data")
    changed = settings.model_copy(deep=True)
    changed.tasks["mine"].dropout = 0.0
    before, after = (steps_of(recipe, tmp_path / "run") for recipe in (settings, changed))
    redone = {new.id for old, new in zip(before, after, strict=True) if old.fingerprint != new.fingerprint}
    assert redone == {StageId("mine", 0, "transfer")}


def test_unfinished_work_with_other_settings_needs_redo_too(tmp_path):
    settings = small_recipe(tmp_path / "data")
    folder = tmp_path / "run"
    mark = folder / ".work" / "prune" / "fingerprint"
    mark.parent.mkdir(parents=True)
    mark.write_text("of two days' work")
    (mark.parent / "checkpoint-2").mkdir()
    with pytest.raises(InputError, match=r"prune \(unfinished\).*--redo"):
        refuse_changes(steps_of(settings, folder), folder, False)
    assert (mark.parent / "checkpoint-2").exists()


def test_what_only_costs_memory_may_change_and_the_tokenizer_may_not(tmp_path):
    settings = small_recipe(tmp_path / "data")

    def prints(recipe):
        return {str(step): step.fingerprint for step in steps_of(recipe, tmp_path / "run")}

    before = prints(settings)
    cheaper = settings.model_copy(deep=True)
    cheaper.prune.micro_batch, cheaper.prune.checkpoint_activations, cheaper.teacher.save_steps = 2, True, 3
    assert prints(cheaper) == before
    tokenizer = tmp_path / "data" / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase":true', '"lowercase":false') + " ")
    assert all(before[name] != new for name, new in prints(settings).items())


def test_a_second_process_is_kept_out(tmp_path):
    refused = pytest.raises(InputError, match="another pruneofa is at work here")
    targets, name = [tmp_path / "run" / RUN], tmp_path / "run"
    with exclusive(targets, name=name), refused, exclusive(targets, name=name):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_teacher_without_a_trained_head_is_refused_before_anything_is_written(tmp_path):
    def checked(recipe_now):
        inputs = Inputs(recipe_now)
        check(recipe_now, inputs, plan(recipe_now, inputs, tmp_path / "run"))

    settings = small_recipe(tmp_path / "data")
    checked(settings)
    given = settings.model_copy(deep=True)
    given.tasks["mine"].teacher = str(tmp_path / "data" / "model")
    with pytest.raises(InputError, match="not fine-tuned for classification"):
        checked(given)
    headless = write_model(tmp_path / "headless", tiny_bert(BertModel))
    with pytest.raises(InputError, match="head is missing"):
        checked(settings.model_copy(update={"model": str(headless), "teacher": None}))
    assert not (tmp_path / "run").exists()


def test_a_dense_model_of_another_depth_is_refused_before_it_is_trained(tmp_path):
    settings = small_recipe(tmp_path / "data")
    deep = write_model(tmp_path / "deep", tiny_bert(num_hidden_layers=3))
    changed = {"model_is_sparse": True, "dense_model": str(deep), "teacher": None, "prune": None, "control": False}
    given = settings.model_copy(update=changed, deep=True)
    given.model = str(write_model(tmp_path / "sparse", half_pruned(tiny_bert())))
    given.tasks["mine"].hidden = 1.0
    with pytest.raises(InputError, match=r"tasks.mine.hidden is above 0, but num_hidden_layers .* is 3, wanted .* 2"):
        run(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_control_for_no_task_is_none(tmp_path):
    settings = small_recipe(tmp_path / "data", "control={tasks: []}")
    names = {str(step) for step in steps_of(settings, tmp_path / "run")}
    assert "control" in names and not any(name.endswith("/control") for name in names)


@pytest.mark.parametrize("link", [".work", ".work/teacher", ".work/tasks"])
def test_a_folder_of_work_that_is_a_link_is_refused_before_anything_is_written(tmp_path, link):
    settings = small_recipe(tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "run" / link).parent.mkdir(parents=True)
    (tmp_path / "run" / link).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=rf"{link}: is a link, wanted a folder that pruneofa makes itself"):
        run(settings, tmp_path / "run")
    assert not list((tmp_path / "mine").iterdir())


def test_a_model_that_the_engine_cannot_run_is_refused_before_int8_work(tmp_path):
    settings = small_recipe(tmp_path / "data")
    model = write_model(tmp_path / "silu", tiny_bert(hidden_act="silu"))
    changed = settings.model_copy(update={"model": str(model), "quantize": recipe.Quantize()})
    with pytest.raises(InputError, match="activation 'silu' in config.json"):
        run(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_recipes_folder_is_refused(done, tmp_path):
    settings, folder, _ = done
    with pytest.raises(InputError, match="contains the run 'small', this recipe is 'other'"):
        run(settings.model_copy(update={"name": "other"}), folder)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty and not a run's folder"):
        run(settings, tmp_path)


def test_a_sparse_model_is_a_start(done, tmp_path):
    _, folder, _ = done
    data = write_task(tmp_path / "t.csv")
    spec = recipe.Task(data=str(data), text="sentence", label="verdict", epochs=1, max_length=32, kd=0, hard=1)
    options = {"data_root": None, "seed": 0, "precision": "fp32"}
    out = tmp_path / "out"
    metrics = single.transfer(str(folder / "sparse"), out, "mine", spec.resolved("mine"), **options)
    assert set(metrics) == {"accuracy", "f1"}
    assert verify(str(folder / "sparse"), str(out))["ok"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t.csv"]
    assert "transfer" in (out / "log.jsonl").read_text()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="this command did not make it"):
        single.transfer(str(folder / "sparse"), tmp_path / "mine", "mine", spec.resolved("mine"), **options)


def test_prune_alone(tmp_path):
    settings = small_recipe(tmp_path / "data", "prune.pattern=4x1", "prune.final=0.75")
    metrics = single.prune(settings.model_copy(update={"tasks": {}}), tmp_path / "out")
    assert metrics["loss"] > 0
    assert pattern.inspect(str(tmp_path / "out"))["encoder"] == pytest.approx(0.75, abs=5e-3)
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["settings"]["prune"]["pattern"] == "4x1"
    assert (tmp_path / "out-teacher" / "model.safetensors").exists()
