"""What the engine says of a run's task models is kept beside them, and reaches results.json."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pruneofa.bench.workers import WorkerError
from pruneofa.data.tasks import load_task
from pruneofa.engine import engine
from pruneofa.formats.files import read_json, write_json
from pruneofa.report.schema import check_results
from pruneofa.run import by_engine, results
from pruneofa.run.by_engine import FILE, measure_by_engine
from pruneofa.train.evaluate import evaluate
from tests.small import small_recipe
from tests.tiny import tiny_tokenizer
from tests.train.test_evaluate_engine import named, save

pytestmark = pytest.mark.skipif(engine.native is None, reason="the native kernels were not built")
LABELS = ["bad", "good"]
VERSIONS = {"tokens": 1, "seconds": 1.0, "versions": {"pruneofa": "0"}}


@dataclass
class Stage:
    name: str
    folder: Path


@pytest.fixture
def run(tmp_path):
    """A run's folder with a sparse model and four variants of one task, and the task."""
    recipe = small_recipe(tmp_path / "data")
    spec = recipe.tasks["mine"].resolved("mine")
    stages = [Stage("prune", save(tmp_path / "run" / "sparse", "Bert", "PreTraining"))]
    for variant in ("teacher", "transfer", "ptq", "quantize", "control"):
        folder = save(tmp_path / "run/tasks/mine/seed-0" / variant, "Bert", "SequenceClassification", **named(LABELS))
        write_json(folder / "metrics.json", evaluate(folder, "mine", spec, data_root=recipe.data_root))
        stages.append(Stage(f"tasks/mine/seed-0/{variant}", folder))
    for stage in stages:
        write_json(stage.folder / "stage.json", VERSIONS)
    task = load_task("mine", spec, tiny_tokenizer(), train=False, data_root=recipe.data_root)
    return recipe, tmp_path / "run", stages, task


def test_every_variant_by_the_engine_once(run, capsys):
    recipe, folder, stages, task = run
    asked = []
    measure_by_engine(stages, lambda name: asked.append(name) or task)
    assert asked == ["mine"] * 4
    assert "evaluate quantize on mine by the engine in int8 on " in capsys.readouterr().err
    kept = {stage.folder.name: stage.folder / FILE for stage in stages if (stage.folder / FILE).exists()}
    assert set(kept) == {"teacher", "transfer", "ptq", "quantize"}
    records = {name: read_json(file) for name, file in kept.items()}
    assert {name: record["precision"] for name, record in records.items()} == {
        "teacher": "fp32", "transfer": "fp32", "ptq": "int8", "quantize": "int8",
    }  # fmt: skip
    for name in ("teacher", "transfer"):  # fp32 is fp32
        assert records[name]["metrics"] == read_json(kept[name].with_name("metrics.json"))
    times = {name: file.stat().st_mtime_ns for name, file in kept.items()}
    assert measure_by_engine(stages, lambda name: pytest.fail("measured again"))
    assert times == {name: file.stat().st_mtime_ns for name, file in kept.items()}

    found = results.collect(recipe, folder, stages)
    check_results(found)
    accuracy = found["tasks"]["mine"]["accuracy"]
    assert set(accuracy) == {v + e for v in ("dense", "transfer", "ptq", "quantize") for e in ("", "_engine")} | {
        "control"
    }
    assert accuracy["quantize_engine"]["runs"] == [{"seed": 0, "value": records["quantize"]["metrics"]["accuracy"]}]
    sizes = found["sizes"]
    assert sizes["dense_fp32"] > sizes["packed_int8"] > 0 and sizes["compressed_int8_model"] > 0
    weights = sum(np.prod(np.shape(v)) for v in _tensors(stages[-2].folder))
    assert sizes["model_fp32"] == 4 * weights
    latency = found["latency"]
    assert set(latency) == {"setting", "dense", "dense_engine", "transfer_engine", "ptq_engine", "quantize_engine"}
    assert latency["setting"]["tokens"] == 64 and latency["setting"]["repeats"] == 30  # what tiny models take
    assert all(0 < v["p10_ms"] <= v["median_ms"] <= v["p90_ms"] for k, v in latency.items() if k != "setting")
    results.write_reports(recipe, folder, found)
    text = (folder / "table.md").read_text()
    assert "small: Prune Once for All + int8 in training, by the engine (1 seed)" in text
    assert "| packed int8, scales counted |" in text and "| dense, by torch in fp32 |" in text


def _tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors").values()


def test_a_run_without_int8_is_left_alone(run):
    recipe, folder, stages, _ = run
    stages = [stage for stage in stages if not stage.name.endswith(("ptq", "quantize"))]
    assert not measure_by_engine(stages, lambda name: pytest.fail("evaluated"))
    assert not list(folder.rglob(FILE))
    found = results.collect(recipe, folder, stages)
    assert found["latency"] == {} and "packed_int8" not in found["sizes"]


@pytest.mark.parametrize("changed", ["pruneofa", "isa"])
def test_what_another_version_or_other_kernels_measured_is_measured_again(run, changed, monkeypatch):
    _, _, stages, task = run
    monkeypatch.setattr("pruneofa.bench.latency.latency", lambda *_, **__: {"setting": {}})
    measure_by_engine(stages, lambda name: task)
    file = stages[1].folder / FILE
    before = read_json(file)
    write_json(file, before | {changed: "other"})
    asked = []
    measure_by_engine(stages, lambda name: asked.append(name) or task)
    assert asked == ["mine"] and read_json(file)[changed] == before[changed]


def test_a_new_stage_is_measured_and_all_are_timed_again_beside_it(run, monkeypatch):
    _, _, stages, task = run
    timed = []

    def latency(runners, *, tokens, vocabulary):
        timed.append([runner.name for runner in runners])
        return {"setting": {}} | {
            runner.name: {"median_ms": len(timed), "p10_ms": 1, "p90_ms": 1} for runner in runners
        }

    monkeypatch.setattr("pruneofa.bench.latency.latency", latency)
    measure_by_engine([stage for stage in stages if not stage.name.endswith("/ptq")], lambda name: task)
    measure_by_engine(stages, lambda name: task)
    assert timed == [
        ["dense_engine", "transfer_engine", "quantize_engine", "dense"],
        ["dense_engine", "transfer_engine", "ptq_engine", "quantize_engine", "dense"],
    ]
    assert {read_json(s.folder / FILE)["latency"]["dense"]["median_ms"] for s in stages[1:5]} == {2}


def test_latency_that_cannot_be_measured_is_said_and_fails_nothing(run, monkeypatch, capsys):
    _, _, stages, task = run

    def latency(*_, **__):
        raise WorkerError("its process ended with -9")

    monkeypatch.setattr("pruneofa.bench.latency.latency", latency)
    measure_by_engine(stages, lambda name: task)
    assert "latency was not measured: its process ended with -9\n" in capsys.readouterr().err
    assert "latency" not in read_json(stages[1].folder / FILE)


def test_a_teacher_that_was_only_measured_has_no_model_to_run(run, monkeypatch):
    _, _, stages, task = run
    monkeypatch.setattr(by_engine, "_add_latency", lambda folders: None)
    (stages[1].folder / "config.json").unlink()
    measure_by_engine(stages, lambda name: task)
    assert not (stages[1].folder / FILE).exists() and (stages[2].folder / FILE).exists()


def test_every_model_of_a_task_is_verified(run):
    recipe, folder, stages, _ = run
    sparse = stages[0].folder
    for stage in stages[1:]:
        (stage.folder / "model.safetensors").write_bytes((sparse / "model.safetensors").read_bytes())
    assert results.verify_run(recipe, folder) == 3
