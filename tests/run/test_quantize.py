"""The stages ptq and quantize of a run, and the same alone."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pruneofa import recipe
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats import pattern
from pruneofa.formats import scales as quantization
from pruneofa.formats.files import read_json
from pruneofa.formats.verify import verify
from pruneofa.run import fine_tuning, single
from pruneofa.run import run as runs
from pruneofa.run.estimate import estimate
from pruneofa.run.inputs import Inputs
from pruneofa.run.lineage import sparse_of_run
from pruneofa.run.plan import int8_stages, plan
from pruneofa.run.run import run
from pruneofa.run.stage import Job, Model, Stage
from pruneofa.train.evaluate import evaluate, evaluate_model
from tests.peers import without_torch
from tests.small import small_recipe, write_task

SEED = "tasks/mine/seed-0"
KEY = "encoder.layer.1.attention.self.key.weight"
ALONE = {"data_root": None, "seed": 0, "precision": "fp32"}


def with_int8(settings, **section):
    return settings.model_copy(update={"quantize": recipe.Quantize(**section)})


def int8_stage(settings, variant, **section):
    """The stage ptq or quantize of the recipe's task."""
    settings = with_int8(settings, **section)
    stages = int8_stages(settings, Inputs(settings), "mine", 0, Model("", ""), None, None, Path())
    return next(stage for stage in stages if stage.id.variant == variant)


def calibrated(settings, model, **section):
    stage = int8_stage(settings, "ptq", **section)
    task = stage.inputs["task"].read()
    return fine_tuning.calibrate(stage.settings, None, model=Model(str(model), ""), task=task), task


def fingerprints(folder):
    return {file.parent: read_json(file)["fingerprint"] for file in folder.rglob("stage.json")}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _peers_without_torch():
    with pytest.MonkeyPatch.context() as patch:
        without_torch(patch)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run without int8 that was then given a quantize section."""
    root = tmp_path_factory.mktemp("int8")
    settings = small_recipe(root / "data")
    run(settings, root / "run")
    before = fingerprints(root / "run"), {f: f.stat().st_mtime_ns for f in root.rglob("model.safetensors")}
    rows = estimate(with_int8(settings), root / "run")
    results = run(with_int8(settings), root / "run")
    return settings, root / "run", results, before, rows


def test_a_finished_run_is_continued_and_nothing_else_is_made_again(done):
    _, folder, results, (prints, times), rows = done
    status = {row["stage"]: row["status"] for row in rows}
    stages = {f"{SEED}/ptq", f"{SEED}/quantize"}
    assert {stage for stage in status if status[stage] == "run"} == stages | {f"evaluate {stage}" for stage in stages}
    assert next(row for row in rows if row["stage"] == f"{SEED}/quantize")["steps"] == 18
    assert {path: fingerprints(folder)[path] for path in prints} == prints
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert set(results["stages"]) == {"teacher", "prune"} | {
        f"{SEED}/{variant}" for variant in ("teacher", "transfer", "ptq", "quantize")
    }
    variants = {"dense", "transfer", "ptq", "quantize"}
    assert set(results["tasks"]["mine"]["accuracy"]) == variants | {f"{variant}_engine" for variant in variants}
    assert results["stages"][f"{SEED}/quantize"]["tokens"] > 0 == results["stages"][f"{SEED}/ptq"]["tokens"]


def test_running_again_does_nothing_and_taking_int8_away_neither(done):
    settings, folder, results, *_ = done
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("model.safetensors")}
    assert run(with_int8(settings), folder) == results
    run(settings, folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("model.safetensors")}


def test_changed_numerics_redo_the_int8_stages_only(done, tmp_path):
    settings, folder, *_ = done

    def changed(**section):
        return {stage.id.variant for stage in stages(with_int8(settings, **section)) if stage.status == "changed"}

    def stages(recipe):
        return [step for step in plan(recipe, Inputs(recipe), folder) if isinstance(step, Stage)]

    assert changed(weights="tensor") == changed(activations="dynamic") == {"ptq", "quantize"}
    assert changed(calibration=8) == changed(observer="percentile") == {"ptq"}
    assert changed(freeze=1.0) == {"quantize"}
    assert changed(percentile=99.0) == changed(ptq=False) == set()
    other = settings.model_copy(deep=True)
    other.tasks["mine"].qat_rows = 32
    assert {str(stage) for stage in stages(with_int8(other)) if stage.status == "changed"} == {f"{SEED}/quantize"}


@pytest.mark.parametrize("variant", ["ptq", "quantize"])
def test_the_folder_is_ordinary_on_the_grid_and_keeps_the_pattern(done, variant):
    _, folder, *_ = done
    made = folder / SEED / variant
    found = verify(str(folder / "sparse"), str(made))
    assert found["ok"] and not found["negative_zeros"]
    _, info = AutoModelForSequenceClassification.from_pretrained(made, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    scales = quantization.read(made)
    for name, weight in pattern.read_weights(made, lambda name, _: name in scales.weight_scale):
        quantization.codes(name, weight, scales.weight_scale[name])
    hashes = pattern.inspect(made)
    assert (scales.pattern_hash, scales.pooler_hash) == (hashes["pattern_hash"], hashes["pooler_hash"])
    start = weights(folder / SEED / "transfer")
    biases = [name for name in start if name.endswith("bias")]
    same = [np.array_equal(weights(made)[name], start[name]) for name in biases]
    assert all(same) if variant == "ptq" else not any(same[1:])
    assert not (set(p.suffix for p in made.iterdir()) - {".json", ".safetensors", ".npz"})
    assert "quantization" not in read_json(made / "config.json")


@pytest.mark.parametrize("variant", ["ptq", "quantize"])
def test_metrics_are_those_of_the_simulation(done, variant):
    settings, folder, *_ = done
    made = folder / SEED / variant
    found = evaluate(made, "mine", settings.tasks["mine"], data_root=settings.data_root)
    assert found == read_json(made / "metrics.json")


def test_a_pattern_broken_by_hand_stops_the_next_stage_with_layer_and_count(done, copy):
    settings = done[0]
    for variant in ("ptq", "quantize"):
        shutil.rmtree(copy / SEED / variant)
    file = copy / SEED / "transfer" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors[f"bert.{KEY}"]
    rows, columns = (weight == 0).nonzero()
    weight[rows[:3], columns[:3]] = 1e-30
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckFailed, match=rf"transfer: lost the pattern of .*sparse: {KEY}: 3 revived"):
        run(with_int8(settings), copy)
    assert not (copy / SEED / "ptq").exists()
    data = write_task(copy.parent / "t.csv")
    spec = recipe.Task(data=str(data), text="sentence", label="verdict", max_length=32, kd=0, hard=1).resolved("mine")
    with pytest.raises(CheckFailed, match=f"{KEY}: 3 revived"):
        single.quantize(str(file.parent), copy.parent / "out", "mine", spec, recipe.Quantize(), **ALONE)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["run", "t.csv"]


def test_killed_and_resumed_it_ends_with_the_same_bits(done, copy, monkeypatch):
    settings, folder, *_ = done
    shutil.rmtree(copy / SEED / "quantize")
    train = fine_tuning.train

    class Killed(fine_tuning.QuantizeCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == 11:
                raise MemoryError("killed")

    monkeypatch.setattr(fine_tuning, "train", lambda *args, **options: train(*args, **options | {"save_steps": 4}))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(fine_tuning, "QuantizeCallback", Killed)
        run(with_int8(settings), copy)
    checkpoints = sorted(path.name for path in (copy / ".work" / SEED / "quantize").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-4", "checkpoint-8"]
    assert (copy / ".work" / SEED / "quantize/checkpoint-8/observers.safetensors").exists()
    run(with_int8(settings), copy)
    events = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "start" and e["stage"].endswith("/quantize")][-1] == 8
    for file in ("model.safetensors", "quantization.safetensors"):
        assert (copy / SEED / "quantize" / file).read_bytes() == (folder / SEED / "quantize" / file).read_bytes()


def test_without_the_observers_of_a_checkpoint_the_one_before_it_is_resumed(done, copy, monkeypatch, capsys):
    settings = done[0]
    shutil.rmtree(copy / SEED / "quantize")
    train = fine_tuning.train
    kill = {"at": 11}

    class Killed(fine_tuning.QuantizeCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == kill["at"]:
                raise MemoryError("killed")

    monkeypatch.setattr(fine_tuning, "train", lambda *args, **options: train(*args, **options | {"save_steps": 4}))
    monkeypatch.setattr(fine_tuning, "QuantizeCallback", Killed)
    with pytest.raises(MemoryError):
        run(with_int8(settings), copy)
    (copy / ".work" / SEED / "quantize/checkpoint-8/observers.safetensors").unlink()
    kill["at"] = None
    run(with_int8(settings), copy)
    assert "checkpoint-8" in capsys.readouterr().err
    events = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "start" and e["stage"].endswith("/quantize")][-1] == 4


def test_observers_freeze_at_their_share_of_the_steps(done, tmp_path, monkeypatch):
    settings, folder, *_ = done
    seen = []

    class Watched(fine_tuning.QuantizeCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(self.quantizer.state_dict())

    monkeypatch.setattr(fine_tuning, "QuantizeCallback", Watched)
    stage = int8_stage(settings.model_copy(update={"precision": "bf16"}), "quantize", freeze=0.5)
    model = Model(str(folder / SEED / "transfer"), "")
    job = Job("x", tmp_path, lambda event: None)
    fine_tuning.quantize_aware(stage.settings, job, model=model, teacher=None, task=stage.inputs["task"].read())
    moved = [not all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(seen)]
    assert moved == [True] * 8 + [False] * 9


def test_rows_of_an_epoch_are_drawn_from_all(done):
    settings, *_ = done
    stage = int8_stage(settings, "quantize")
    task = stage.inputs["task"].read()
    data, steps = fine_tuning.qat_dataset(replace(stage.settings, rows=32), task)
    assert (steps, len(data)) == (3 * 2, 3 * 32)
    whole, every = fine_tuning.qat_dataset(replace(stage.settings, rows=10**6), task)
    assert (every, len(whole)) == (3 * 6, 3 * 96)
    assert all(np.array_equal(data[index]["input_ids"], whole[index]["input_ids"]) for index in range(len(data)))


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_calibration_reads_as_many_examples_as_it_says(done, observer, monkeypatch):
    settings, folder, *_ = done
    seen = []
    calibrate = fine_tuning.FakeQuantizer.calibrate

    def counted(self, inputs, percentile=None):
        data = list(inputs)
        seen.append((sum(len(batch["input_ids"]) for batch in data), percentile))
        calibrate(self, data, percentile)

    monkeypatch.setattr(fine_tuning.FakeQuantizer, "calibrate", counted)
    for examples in (40, 10**6):
        section = {"calibration": examples, "observer": observer, "percentile": 99.9}
        calibrated(settings, folder / SEED / "transfer", **section)
    assert seen == [(40, None if observer == "minmax" else 99.9), (96, None if observer == "minmax" else 99.9)]


def test_classes_in_another_order_are_matched_by_name(done, tmp_path):
    settings, folder, *_ = done
    turned = tmp_path / "turned"
    shutil.copytree(folder / SEED / "transfer", turned)
    tensors = load_file(turned / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, turned / "model.safetensors", {"format": "pt"})
    config = read_json(turned / "config.json") | {"id2label": {"0": "good", "1": "bad"}}
    (turned / "config.json").write_text(json.dumps(config))
    (first, task), (second, _) = (calibrated(settings, path) for path in (folder / SEED / "transfer", turned))
    assert evaluate_model(first.model, task).values == evaluate_model(second.model, task).values
    made = [first, second]
    assert torch.equal(made[0].model.classifier.weight, made[1].model.classifier.weight)
    assert made[1].model.config.id2label == {0: "bad", 1: "good"}


def test_quantizing_twice_is_refused(done, tmp_path):
    settings, folder, *_ = done
    spec = settings.tasks["mine"].model_copy(update={"hard": 1.0, "kd": 0.0}).resolved("mine")
    with pytest.raises(InputError, match=r"is already quantized \(quantization\.json is in it\), .*quantizing twice"):
        single.quantize(
            str(folder / SEED / "ptq"), tmp_path / "out", "mine", spec, recipe.Quantize(),
            **ALONE | {"data_root": settings.data_root},
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_sparse_model_of_a_run_is_found_and_of_other_folders_is_not(done, tmp_path):
    _, folder, *_ = done
    assert sparse_of_run(folder / SEED / "transfer") == str(folder.resolve() / "sparse")
    shutil.copytree(folder / SEED / "transfer", tmp_path / "copy")
    assert sparse_of_run(tmp_path / "copy") is None
    assert sparse_of_run(folder / SEED / "teacher") is None
    assert sparse_of_run(folder / "sparse") is None
    assert sparse_of_run(folder.parent / "data" / "model") is None


def test_other_ranks_are_gone_and_results_are_there_before_the_engine_measures(done, copy, monkeypatch):
    happened = []
    monkeypatch.setattr(
        runs, "processes", lambda: SimpleNamespace(
            is_main_process=True, num_processes=1, wait_for_everyone=lambda: happened.append("barrier")
        )
    )  # fmt: skip

    def measure(*_):
        happened.append("measure")
        assert (copy / "results.json").exists() and (copy / "report.html").exists()
        raise InputError("the engine says no")

    monkeypatch.setattr(runs, "measure_by_engine", measure)
    for file in ("results.json", "report.html"):
        (copy / file).unlink()
    with pytest.raises(InputError, match="the engine says no"):
        run(with_int8(done[0]), copy)
    assert happened[-1] == "measure" and {*happened[:-1]} == {"barrier"}
