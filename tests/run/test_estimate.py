"""What a dry run says, without training anything but its five steps."""

import json

import pytest
from transformers import BertForSequenceClassification

from pruneofa.errors import InputError
from pruneofa.formats.files import write_json
from pruneofa.recipe import dump
from pruneofa.run import estimate as estimates
from pruneofa.run.inputs import Inputs
from pruneofa.run.plan import plan
from pruneofa.run.stage import Stage
from pruneofa.train import sparse_linear
from tests.small import small_recipe
from tests.tiny import half_pruned, tiny_bert, write_model


@pytest.fixture
def costs(tmp_path, monkeypatch):
    """Rows by stage of a recipe whose every token takes a second, and every evaluation ten minutes."""
    monkeypatch.setattr(estimates, "_seconds_per_token", lambda *_: 1.0)
    monkeypatch.setattr(estimates, "evaluation_seconds", lambda *_: 600.0)

    def rows(*overrides):
        settings = small_recipe(tmp_path / "data", *overrides)
        return settings, {row["stage"]: row for row in estimates.estimate(settings, tmp_path / "run")}

    return rows


def begin(settings, folder, stage, *parts, finished=()):
    """The working folder of a stage that was killed: checkpoints at steps, learning rates that are through."""
    begun = next(known for known in plan(settings, Inputs(settings), folder) if str(known) == stage)
    work = begun.work
    work.mkdir(parents=True)
    (work / "fingerprint").write_text(begun.fingerprint)
    for part, step in parts:
        checkpoint = work / part / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "complete").touch()
    for part in finished:
        (work / part).mkdir(parents=True, exist_ok=True)
        (work / part / "done.json").write_text(json.dumps({"lr": 1}))
    return work


def test_steps_of_a_task_are_those_of_its_training(costs, tmp_path):
    settings, rows = costs("tasks.mine.train_rows=50")
    task = Inputs(settings).task("mine")
    steps = len(task.train.train_dataset(16, 0, 2)) // 16
    assert steps == 8  # 50 rows are 4 batches of 16; 100 rows would be 6
    assert rows["tasks/mine/seed-0/teacher"]["steps"] == rows["tasks/mine/seed-0/transfer"]["steps"] == steps


def test_a_stage_that_was_begun_costs_what_is_left(costs, tmp_path):
    settings, before = costs()
    assert before["prune"]["status"] == "run"
    begin(settings, tmp_path / "run", "prune", ("", 2), ("", 4))
    _, after = costs()
    assert after["prune"]["status"] == "resume"
    assert after["prune"]["minutes"] == pytest.approx(0.6 * before["prune"]["minutes"], abs=0.06)
    _, changed = costs("prune.final=0.7")
    assert changed["prune"]["status"] == "changed"
    assert changed["prune"]["minutes"] == before["prune"]["minutes"]


def test_a_control_that_is_half_through_resumes(costs, tmp_path):
    control = "control={lr: [1e-4, 1e-3]}"
    settings, before = costs(control)
    assert (before["control"]["status"], before["control"]["steps"]) == ("run", 20)
    begin(settings, tmp_path / "run", "control", ("lr-0.001", 5), finished=["lr-0.0001"])
    _, after = costs(control)
    assert after["control"]["status"] == "resume"
    assert after["control"]["minutes"] == pytest.approx(before["control"]["minutes"] / 4, abs=0.06)


def test_what_the_card_says_makes_no_stage_again(tmp_path):
    def prints(*overrides):
        settings = small_recipe(tmp_path / "data", *overrides)
        return [step.fingerprint for step in plan(settings, Inputs(settings), tmp_path / "run")]

    assert prints("card={license: mit, authors: A, base_model: a/b, language: [de]}") == prints()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.micro_batch=3", "batch is 8, which 1 process"),
        ("corpus.max_length=65", "corpus.max_length is 65 but"),
        ("prune.skip=['(']", "is not a regular expression"),
        ("tasks.mine.teacher=./none", "model ./none: no such folder"),
    ],
)
def test_what_a_run_would_refuse_a_dry_run_refuses(costs, tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        costs(override)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_the_folders_that_a_run_would_refuse(costs, tmp_path, monkeypatch):
    settings, _ = costs()
    write_json(tmp_path / "run" / "teacher" / "stage.json", {})
    (tmp_path / "run" / "recipe.yaml").write_text(dump(settings))
    with pytest.raises(InputError, match=r"run: has records of format 0, .* \(teacher\)"):
        costs()
    rows = estimates.estimate(settings, tmp_path / "run", redo=True)
    assert rows[0]["status"] == "changed"
    (tmp_path / "run" / "sparse").mkdir()
    (tmp_path / "run" / "sparse" / "notes").touch()
    with pytest.raises(InputError, match="sparse: contains files, but no stage made it"):
        estimates.estimate(settings, tmp_path / "run", redo=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / ".work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"\.work: is a link"):
        costs()


def test_a_dry_run_refuses_int8_that_the_engine_cannot_run(costs, monkeypatch):
    monkeypatch.setenv("PRUNEOFA_ISA", "abacus")
    costs()
    with pytest.raises(InputError, match="abacus"):
        costs("quantize={}")


@pytest.mark.parametrize("key", ["tasks.mine.teacher", "dense_model"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_position_embeddings": 6}, r"an input has \d+ tokens but .*/other has 6 positions; lower max_"),
        ({"type_vocab_size": 1}, r"an input has 2 token types but .*/other has 1; use another model"),
    ],
)
def test_a_dense_model_that_is_too_small_for_the_inputs_is_refused(costs, tmp_path, key, config, message):
    classes = {} if key == "dense_model" else {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    write_model(tmp_path / "other", tiny_bert(BertForSequenceClassification, **config, **classes))
    write_model(tmp_path / "sparse", half_pruned(tiny_bert()))
    sparse = ["model_is_sparse=true", "teacher=null", "prune=null", "corpus=null", f"model={tmp_path / 'sparse'}"]
    with pytest.raises(InputError, match=f"tasks.mine: {message}"):
        costs(f"{key}={tmp_path / 'other'}", "tasks.mine.text=[sentence,sentence]", *sparse)


def test_the_corpus_is_not_tokenized(costs, monkeypatch):
    monkeypatch.setattr("pruneofa.data.corpus.build_corpus", lambda *_, **__: pytest.fail("tokenized"))
    costs()


def test_evaluations_are_listed_with_their_time(costs):
    _, rows = costs("quantize={}")
    evaluations = {stage: row for stage, row in rows.items() if stage.startswith("evaluate ")}
    seed = "tasks/mine/seed-0"
    assert set(evaluations) == {f"evaluate {seed}/{name}" for name in ("teacher", "transfer", "ptq", "quantize")}
    for row in evaluations.values():
        assert (row["status"], row["steps"], row["minutes"]) == ("run", None, 10.0) and row["tokens"] > 0
    assert rows["total"]["minutes"] >= 40


@pytest.mark.parametrize(
    ("override", "skipping"),
    [
        ("control={lr: [1e-4]}", {"control", "tasks/mine/seed-0/transfer", "tasks/mine/seed-0/control"}),
        ("prune.one_shot=true", {"prune", "tasks/mine/seed-0/transfer"}),
        ("prune.final=0.5", set()),
        ("tasks.mine.skip_zeros=false", set()),
        ("precision=bf16", set()),
    ],
)
def test_locked_stages_are_timed_as_they_train(tmp_path, monkeypatch, override, skipping):
    settings = small_recipe(tmp_path / "data", override, "quantize={}")
    inputs = Inputs(settings)
    apply, products = sparse_linear._Products.apply, []
    monkeypatch.setattr(sparse_linear._Products, "apply", lambda *given: products.append(1) or apply(*given))
    found = {}
    for stage in plan(settings, inputs, tmp_path / "run"):
        if isinstance(stage, Stage) and estimates._size(inputs, stage)[2]:
            products.clear()
            _, *size = estimates._size(inputs, stage)
            assert estimates._seconds_per_token(settings, inputs, stage, *size) > 0
            found[str(stage.id)] = len(products)
    assert {stage for stage, count in found.items() if count} == skipping
    assert all(found[stage] % estimates.PROBE_STEPS == 0 for stage in skipping)  # in every step


def test_the_time_of_a_step_is_that_of_the_weights_that_are_trained(tmp_path):
    settings = small_recipe(tmp_path / "data")
    settings.tasks["mine"].freeze_embeddings = True
    inputs = Inputs(settings)
    stage = next(step for step in plan(settings, inputs, tmp_path / "run") if str(step.id).endswith("/transfer"))
    objective, _ = estimates._task_probe(settings, inputs.task("mine"), stage.settings, 256.0)
    assert not objective.student.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"epochs": 4}, 1 + 8 / 4),
        ({"epochs": 4, "hidden": 1.0}, 100),
        ({"epochs": 1}, 100),
    ],
)
def test_a_teacher_that_runs_once_costs_one_pass(tmp_path, monkeypatch, fields, seconds):
    """A step with the teacher takes 100 seconds, without it one, the teacher alone 8."""
    settings = small_recipe(tmp_path / "data")
    settings.tasks["mine"] = settings.tasks["mine"].model_copy(update=fields)
    inputs = Inputs(settings)
    stage = next(step for step in plan(settings, inputs, tmp_path / "run") if str(step.id).endswith("/transfer"))
    sizes = []

    def time(objective, batch, precision):
        sizes.append(int(batch["attention_mask"].sum()))
        objective(batch, objective.counts(batch))
        return 1.0 if objective.teacher is None else 100.0

    monkeypatch.setattr(estimates, "_time", time)
    monkeypatch.setattr(estimates, "_time_teacher", lambda *_: 8.0)
    _, steps, tokens = estimates._size(inputs, stage)
    found = estimates._seconds_per_token(settings, inputs, stage, steps, tokens)
    assert found * sizes[0] == pytest.approx(seconds)
