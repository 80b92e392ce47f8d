"""The tokens that scores read beside those of training, as `run --dry-run` counts them."""

import pytest

from pruneofa.recipe import Prune
from pruneofa.run.one_shot import ROUNDS, one_shot_schedule, score_tokens


@pytest.mark.parametrize(
    ("settings", "examples"),
    [
        ({"steps": 100}, 0),
        ({"steps": 100, "score": "fisher"}, 0),  # Adam's own moments
        ({"steps": 100, "score": "fisher", "one_shot": True, "gradients": 10}, 40),
        ({"steps": 0, "score": "magnitude", "one_shot": True}, 0),
        ({"steps": 0, "score": "hessian", "one_shot": True, "calibration": 7}, 7),
        ({"steps": 20, "score": "hessian"}, 512),
        # Selections after steps 0, 10, ..., 50; and after 0, 20, 40 and the end.
        ({"steps": 100, "score": "obs", "end": 50, "interval": 10}, 6 * 4096),
        ({"steps": 100, "score": "obs", "end": 50, "interval": 20}, 4 * 4096),
        ({"steps": 100, "score": "obs"}, 6 * 4096),
    ],
)
def test_tokens_of_scores(settings, examples):
    assert score_tokens(Prune(**settings), 16) == 16 * examples


def test_one_shot_ends_at_the_final_sparsity():
    found = one_shot_schedule(Prune(steps=0, one_shot=True, score="obs", begin=7, initial=0.3, final=0.8))
    assert (found["begin"], found["end"], found["stop"], found["interval"]) == (0, ROUNDS, ROUNDS, 1)
    assert found["final"] == 0.8 and "initial" not in found and found["score"] == "obs"
    assert one_shot_schedule(Prune(steps=0, one_shot=True, score="fisher"))["end"] == 1
