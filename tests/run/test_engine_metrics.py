"""What the engine says of a run's task models is kept beside them, and reaches results.json."""

import numpy as np
import pytest

from pruneofa.bench.workers import WorkerError
from pruneofa.data.tasks import load_task
from pruneofa.engine import engine
from pruneofa.formats.files import read_json, write_json
from pruneofa.report.schema import check_results
from pruneofa.run import engine_metrics, results
from pruneofa.run.engine_metrics import FILE, measure_by_engine
from pruneofa.run.fine_tuning import GivenSettings, use_given
from pruneofa.run.names import StageId
from pruneofa.run.stage import FORMAT, Evaluation, LazyData, Stage
from pruneofa.train.evaluate import evaluate
from tests.small import small_recipe
from tests.tiny import tiny_tokenizer
from tests.train.test_evaluate_engine import named, save

pytestmark = pytest.mark.skipif(engine.native is None, reason="the native kernels were not built")
LABELS = ["bad", "good"]
RECORD = {"format": FORMAT, "tokens": 1, "seconds": 1.0, "versions": {"pruneofa": "0"}}


def evaluations(steps):
    return [step for step in steps if isinstance(step, Evaluation)]


@pytest.fixture
def run(tmp_path):
    """A run's folder with a sparse model and five variants of one task; its steps, the evaluations last."""
    recipe = small_recipe(tmp_path / "data")
    spec = recipe.tasks["mine"].resolved("mine")
    task = load_task("mine", spec, tiny_tokenizer(), train=False, data_root=recipe.data_root)

    def stage(*id):
        folder = tmp_path / "run" / StageId(*id).path
        return Stage(StageId(*id), use_given, GivenSettings(), {}, folder, tmp_path / "work")

    stages = [stage(None, None, "prune")]
    save(stages[0].folder, "Bert", "PreTraining")
    for variant in ("dense", "transfer", "ptq", "quantize", "control"):
        made = stage("mine", 0, variant)
        save(made.folder, "Bert", "SequenceClassification", **named(LABELS))
        write_json(made.folder / "metrics.json", evaluate(made.folder, "mine", spec, data_root=recipe.data_root))
        stages.append(made)
    for made in stages:
        write_json(made.folder / "stage.json", RECORD | vars(made.id))
    data = LazyData(task.evaluation_fingerprint, lambda: task)
    return recipe, tmp_path / "run", [*stages, *(Evaluation(made, made.model, data) for made in stages[1:])]


@pytest.fixture
def asked(monkeypatch):
    """The folders that the engine was asked to evaluate."""
    folders = []

    def evaluate_by_engine(folder, task, precision):
        folders.append(folder.name)
        return evaluate_with(folder, task, precision)

    evaluate_with = engine_metrics.evaluate_by_engine
    monkeypatch.setattr(engine_metrics, "evaluate_by_engine", evaluate_by_engine)
    return folders


def test_every_variant_by_the_engine_once(run, asked, capsys):
    recipe, folder, steps = run
    stages = [step for step in steps if isinstance(step, Stage)]
    assert measure_by_engine(evaluations(steps))
    assert asked == ["teacher", "transfer", "ptq", "quantize"]
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
    asked.clear()
    assert measure_by_engine(evaluations(steps)) and not asked
    assert times == {name: file.stat().st_mtime_ns for name, file in kept.items()}

    found = results.collect(recipe, folder, steps)
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


def test_a_run_without_int8_is_left_alone(run, asked):
    recipe, folder, steps = run
    steps = [step for step in steps if step.id.variant not in ("ptq", "quantize")]
    assert not measure_by_engine(evaluations(steps)) and not asked
    assert not list(folder.rglob(FILE))
    found = results.collect(recipe, folder, steps)
    assert found["latency"] == {} and "packed_int8" not in found["sizes"]


@pytest.mark.parametrize("changed", ["pruneofa", "isa", "evaluation"])
def test_what_another_version_other_kernels_or_other_rows_gave_is_measured_again(run, changed, asked, monkeypatch):
    _, _, steps = run
    monkeypatch.setattr("pruneofa.bench.latency.latency", lambda *_, **__: {"setting": {}})
    measure_by_engine(evaluations(steps))
    file = steps[1].folder / FILE
    before = read_json(file)
    write_json(file, before | {changed: "other"})
    asked.clear()
    measure_by_engine(evaluations(steps))
    assert asked == ["teacher"] and read_json(file)[changed] == before[changed]


def test_what_the_engine_gave_on_other_rows_is_no_result(run, monkeypatch):
    """As when quantization is left out and the rows change: torch evaluates again, and the engine does not."""
    recipe, folder, steps = run
    monkeypatch.setattr("pruneofa.bench.latency.latency", lambda *_, **__: {"setting": {}})
    measure_by_engine(evaluations(steps))
    file = steps[1].folder / FILE
    write_json(file, read_json(file) | {"evaluation": "of other rows"})
    found = results.collect(recipe, folder, steps)["tasks"]["mine"]["accuracy"]
    assert "dense_engine" not in found and {"dense", "transfer_engine"} <= set(found)


def test_a_new_stage_is_measured_and_all_are_timed_again_beside_it(run, monkeypatch):
    _, _, steps = run
    timed = []

    def latency(runners, *, tokens, vocabulary):
        timed.append([runner.name for runner in runners])
        return {"setting": {}} | {
            runner.name: {"median_ms": len(timed), "p10_ms": 1, "p90_ms": 1} for runner in runners
        }

    monkeypatch.setattr("pruneofa.bench.latency.latency", latency)
    measure_by_engine([step for step in evaluations(steps) if step.id.variant != "ptq"])
    measure_by_engine(evaluations(steps))
    assert timed == [
        ["dense_engine", "transfer_engine", "quantize_engine", "dense"],
        ["dense_engine", "transfer_engine", "ptq_engine", "quantize_engine", "dense"],
    ]
    assert {read_json(s.folder / FILE)["latency"]["dense"]["median_ms"] for s in steps[1:5]} == {2}


def test_latency_that_cannot_be_measured_is_said_and_fails_nothing(run, monkeypatch, capsys):
    _, _, steps = run

    def latency(*_, **__):
        raise WorkerError("no clock")

    monkeypatch.setattr("pruneofa.bench.latency.latency", latency)
    measure_by_engine(evaluations(steps))
    assert "latency was not measured: no clock\n" in capsys.readouterr().err
    assert "latency" not in read_json(steps[1].folder / FILE)


def test_a_teacher_that_was_only_measured_has_no_model_to_run(run, monkeypatch):
    _, _, steps = run
    monkeypatch.setattr(engine_metrics, "_add_latency", lambda folders: None)
    (steps[1].folder / "config.json").unlink()
    measure_by_engine(evaluations(steps))
    assert not (steps[1].folder / FILE).exists() and (steps[2].folder / FILE).exists()


def test_every_model_of_a_task_is_verified(run):
    recipe, folder, steps = run
    sparse = steps[0].folder
    for step in evaluations(steps):
        (step.folder / "model.safetensors").write_bytes((sparse / "model.safetensors").read_bytes())
    assert results.verify_run(recipe, folder, steps) == 3
