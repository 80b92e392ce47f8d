"""The tokens that scores read beside those of training, as `run --dry-run` counts them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertModel

from pruneofa.errors import CheckFailed
from pruneofa.formats.files import read_json
from pruneofa.recipe import Prune
from pruneofa.run import pretraining, selections
from pruneofa.run.one_shot import ROUNDS, one_shot_schedule, score_tokens
from pruneofa.train.curvature import EXAMPLES
from pruneofa.train.prune import GradualPruner
from tests.tiny import tiny_bert


@pytest.mark.parametrize(
    ("settings", "examples"),
    [
        ({"steps": 100}, 0),
        ({"steps": 100, "score": "fisher"}, 0),  # Adam's own moments
        ({"steps": 100, "score": "fisher", "one_shot": True, "gradients": 10}, 40),
        ({"steps": 0, "score": "magnitude", "one_shot": True}, 0),
        ({"steps": 0, "score": "hessian", "one_shot": True, "calibration": 7}, 7),
        ({"steps": 20, "score": "hessian"}, 512),
        # Selections after steps 10, 20, ..., 50; and after 20, 40 and the end; at step 0 if something is pruned then.
        ({"steps": 100, "score": "obs", "end": 50, "interval": 10}, 5 * 4096),
        ({"steps": 100, "score": "obs", "end": 50, "interval": 20}, 3 * 4096),
        ({"steps": 100, "score": "obs", "initial": 0.5}, 6 * 4096),
        ({"steps": 100, "score": "hessian", "one_shot": False, "calibration": 7}, 5 * 7),
    ],
)
def test_tokens_of_scores(settings, examples):
    prune = Prune(**settings)
    assert score_tokens(prune, 16) == 16 * examples
    if examples and not prune.at_once:
        pruner = GradualPruner(tiny_bert(BertModel), **pretraining.schedule(prune))
        each = prune.calibration if prune.score == "hessian" else prune.gradients * EXAMPLES
        assert examples == each * sum(map(pruner.due, range(prune.steps)))


def test_one_shot_ends_at_the_final_sparsity():
    found = one_shot_schedule(Prune(steps=0, one_shot=True, score="obs", begin=7, initial=0.3, final=0.8))
    assert (found["begin"], found["end"], found["stop"], found["interval"]) == (0, ROUNDS, ROUNDS, 1)
    assert found["final"] == 0.8 and "initial" not in found and found["score"] == "obs"
    assert one_shot_schedule(Prune(steps=0, one_shot=True, score="fisher"))["end"] == 1


def test_a_fit_after_training_has_diverged_says_so(tmp_path):
    student = tiny_bert(BertModel)
    with torch.no_grad():
        student.encoder.layer[0].output.dense.bias[0] = float("nan")
    objective = SimpleNamespace(student=student)
    options = {"seed": 0, "counts": tmp_path / "counts.json"}
    fit = selections.layer_fit(
        objective, lambda: pytest.fail("loaded"), Prune(steps=10, score="hessian"), None, **options
    )
    with pytest.raises(CheckFailed, match="the weights are NaN or infinite after step 5; lower lr"):
        fit(0.5, 4)


def test_real_tokens_of_the_gradients_are_counted_once_for_each_selection(tmp_path, monkeypatch):
    masks = [torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1, 1, 1]])]
    monkeypatch.setattr(selections, "fisher_blocks", lambda objective, weights, given, **_: list(given))

    def examples(*_):
        return ({"attention_mask": mask} for mask in masks)

    options = {"seed": 0, "precision": "fp32", "counts": tmp_path / "counts.json"}
    blocks = selections.obs_blocks(None, Prune(steps=10, score="obs"), examples, **options)
    for t in (2, 4, 4):  # the last again, after a kill
        assert len(blocks({}, t)) == 2
    assert read_json(tmp_path / "counts.json") == {"2": 6, "4": 6}
