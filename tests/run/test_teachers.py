"""Dense models of another family or size than the sparse ones that learn from them, and rates that are too high."""

import json

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from pruneofa.errors import InputError
from pruneofa.formats.files import read_json
from pruneofa.run import estimate as estimates
from pruneofa.run import fine_tuning, pretraining
from pruneofa.run.checks import check
from pruneofa.run.execute import execute_steps
from pruneofa.run.inputs import Inputs
from pruneofa.run.plan import losses, plan
from pruneofa.run.run import run
from pruneofa.train.callbacks import LockCallback
from pruneofa.train.evaluate import load_task_model, logits_of
from pruneofa.train.models import load_tokenizer
from tests.small import small_recipe
from tests.tiny import half_pruned, tiny_bert, tiny_distilbert, write_model

SPARSE = ["model_is_sparse=true", "teacher=null", "prune=null", "corpus=null"]
CLASSES = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


@pytest.fixture
def given(tmp_path):
    """A recipe of pairs of texts for a sparse DistilBERT with a BERT as the teacher, of `config`."""

    def made(*overrides, **config):
        teacher = write_model(
            tmp_path / "bert", half_pruned(tiny_bert(BertForSequenceClassification, **CLASSES, **config))
        )
        sparse = write_model(tmp_path / "distilbert", half_pruned(tiny_distilbert()))
        pairs = ["tasks.mine.text=[sentence,sentence]", f"tasks.mine.teacher={teacher}", f"model={sparse}"]
        return small_recipe(tmp_path / "data", *SPARSE, *pairs, *overrides)

    return made


def test_a_teacher_sees_its_token_types_where_the_student_has_none(given):
    settings = given()
    spec = settings.tasks["mine"].resolved("mine")
    task = Inputs(settings).task("mine")
    teacher = load_task_model(spec.teacher, "classification")
    items = [task.train[row] for row in range(4)]
    texts = task.train.rows.column("sentence").to_pylist()[:4]
    wanted = teacher(**load_tokenizer(spec.teacher)(texts, texts, padding=True, return_tensors="pt")).logits
    with torch.no_grad():
        found = logits_of(teacher, task, items, "fp32")[0]
    np.testing.assert_allclose(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    objective = fine_tuning.transfer_objective(settings.model, teacher, losses(spec), task)
    batch = task.collate(items)
    assert batch["token_type_ids"].max() == 1 and not hasattr(objective.student.config, "type_vocab_size")
    assert objective(batch, objective.counts(batch))["loss"].isfinite()


@pytest.mark.parametrize(
    ("stated", "typed"),
    [({"tokenizer_class": "PreTrainedTokenizerFast"}, True), ({"model_input_names": ["input_ids"]}, False)],
)
def test_a_student_is_trained_with_the_token_types_that_it_is_served_with(stated, typed, tmp_path):
    model = write_model(tmp_path / "bert", half_pruned(tiny_bert()))
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | stated))
    pairs = ["tasks.mine.text=[sentence,sentence]", f"model={model}"]
    task = Inputs(small_recipe(tmp_path / "data", *SPARSE, *pairs)).task("mine")
    assert (task.train.types is not None and task.train.types.max() == 1) == typed


def test_a_dense_model_that_no_task_learns_from_changes_nothing(given, tmp_path):
    alone, beside = (
        given(),
        given(f"dense_model={write_model(tmp_path / 'small', tiny_bert(max_position_embeddings=6))}"),
    )
    folder = tmp_path / "run"
    steps, others = (plan(settings, Inputs(settings), folder) for settings in (alone, beside))
    assert [step.fingerprint for step in steps] == [step.fingerprint for step in others]
    check(beside, Inputs(beside), others)


def test_a_run_with_such_a_teacher(given, tmp_path):
    results = run(given("tasks.mine.epochs=1"), tmp_path / "run")
    assert set(results["tasks"]["mine"]["accuracy"]) == {"dense", "transfer"}


def test_a_teacher_is_timed_at_its_own_size(given, tmp_path, monkeypatch):
    layers = []
    monkeypatch.setattr(estimates, "_time_teacher", lambda made, *_: layers.append(_layers(made.teacher)) or 0.0)
    monkeypatch.setattr(estimates, "evaluation_seconds", lambda model, _: layers.append(_layers(model)) or 1.0)
    estimates.estimate(given(num_hidden_layers=5), tmp_path / "run")
    assert sorted(layers) == [2, 5, 5]  # the student is evaluated; the teacher is evaluated and run


def _layers(model):
    return model.config.num_hidden_layers


def test_a_rate_of_the_control_that_diverges_is_left_out(tmp_path, capsys):
    settings = small_recipe(tmp_path / "data", "control={lr: [1e-3, 1e25]}")
    run(settings, tmp_path / "run")
    assert "the loss is nan" in capsys.readouterr().err
    metrics = read_json(tmp_path / "run" / "control" / "metrics.json")
    assert metrics["lr"] == 1e-3 and "loss_lr_1e+25" not in metrics
    again = small_recipe(tmp_path / "data", "control={lr: [1e24, 1e25]}")
    with pytest.raises(InputError, match=r"control: training diverged with every learning rate \(1e\+24, 1e\+25\)"):
        run(again, tmp_path / "again")


def test_a_rate_of_the_control_that_ends_with_nan_is_left_out_and_its_time_counts(tmp_path, monkeypatch, capsys):
    """The loss is looked at in logs, here after every step; the weights are NaN after the last one only."""
    settings = small_recipe(tmp_path / "data", "control={lr: [1e-4, 1e-3, 2e-3]}", "tasks={}")
    stepped, validated = LockCallback.on_step_end, pretraining.validate
    rates = []

    def on_step_end(self, args, state, control, **kwargs):
        stepped(self, args, state, control, **kwargs)
        if args.learning_rate == 1e-4 and state.global_step == state.max_steps:
            with torch.no_grad():
                next(iter(self.lock.weights.values())).fill_(float("nan"))

    def validate(objective, text, settings):
        found = validated(objective, text, settings)
        if isinstance(settings, pretraining.ControlSettings):
            rates.append(len(rates))
            return found | ({"loss": float("nan")} if len(rates) == 1 else {})
        return found

    monkeypatch.setattr(LockCallback, "on_step_end", on_step_end)
    monkeypatch.setattr(pretraining, "validate", validate)
    execute_steps(plan(settings, Inputs(settings), tmp_path / "run"), lambda _: None)
    said = capsys.readouterr().err
    assert "weights are NaN or infinite after step 10; lower lr, or use precision: fp32: left out" in said
    assert "control: the validation loss is nan; lower control.lr: left out" in said
    metrics = read_json(tmp_path / "run" / "control" / "metrics.json")
    assert metrics["lr"] == 2e-3 and "loss_lr_0.0001" not in metrics and "loss_lr_0.001" not in metrics
    tokens = read_json(tmp_path / "run" / "control" / "stage.json")["tokens"]
    assert metrics["tokens_of_all_rates"] == 3 * tokens > 0
