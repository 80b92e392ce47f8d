"""Settings that nothing reads are said, with the reason; those of a resolved recipe are not."""

from pathlib import Path

import pytest

from pruneofa import recipe
from pruneofa.recipe.unread import given_in_vain

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
BASE = ["name=x", "model=m", "corpus.source=wiki", "prune.steps=1000"]
SPARSE = ["name=x", "model=m", "model_is_sparse=true"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_ours_and_their_resolved_forms_give_nothing_in_vain(path, tmp_path):
    assert len(RECIPES) > 6
    settings = recipe.load([path])
    (tmp_path / "resolved.yaml").write_text(recipe.dump(settings))
    assert given_in_vain(settings) == given_in_vain(recipe.load([tmp_path / "resolved.yaml"])) == {}


def test_what_the_defaults_fill_in_is_not_given():
    for score in ("magnitude", "fisher", "obs", "hessian"):
        for once in ("true", "false"):
            assert given_in_vain(recipe.load([], [*BASE, f"prune.score={score}", f"prune.one_shot={once}"])) == {}


@pytest.mark.parametrize(
    ("given", "keys", "reason"),
    [
        ([*BASE, "prune.gradients=4"], "prune.gradients", "only prune.score obs, and fisher in one shot, read it"),
        ([*BASE, "prune.one_shot=true", "prune.end=400", "prune.rewind=none"], "prune.end prune.rewind", "at once"),
        ([*BASE, "prune.score=obs", "prune.stop=900"], "prune.stop", "with prune.score obs the last selection is at"),
        ([*BASE, "distill.kd=0", "distill.temperature=4"], "distill.temperature", "distill.kd is 0"),
        ([*BASE, "tasks.sst2.qat_rows=9"], "tasks.sst2.qat_rows", "quantize is null"),
        ([*BASE, "tasks.sst2={teacher: t, dense_lr: 1.0}"], "tasks.sst2.dense_lr", "its teacher is given"),
        ([*SPARSE, "tasks.sst2.hidden=1"], "tasks.sst2.hidden", "learns from the labels only"),
        ([*SPARSE, "tasks.sst2={teacher: t, hard: 1, kd: 0, temperature: 3}"], "tasks.sst2.temperature", "kd is 0"),
        ([*SPARSE, "dense_model=d", "tasks.sst2.teacher=t"], "dense_model", "no task without a teacher"),
        ([*SPARSE, "dense_model=d"], "dense_model", "no task without a teacher"),
        ([*SPARSE, "seed=7", "card.license=mit"], "card.license", "so no model card is written"),
        ([*BASE, "prune.save_steps=9", "prune.save_minutes=1"], "prune.save_minutes", "save_steps is given"),
        ([*SPARSE, "corpus.source=wiki", "distill.hidden=1"], "distill.hidden", "prune is null"),
        ([*BASE, "quantize={activations: dynamic, freeze: 0.5}"], "quantize.freeze", "needs no calibration"),
        ([*BASE, "quantize={ptq: false, calibration: 8}"], "quantize.calibration", "quantize.ptq is false"),
        ([*BASE, "teacher={save_steps: 9, save_minutes: 1.0}"], "teacher.save_minutes", "save_steps is given"),
        ([*BASE, "quantize={percentile: 98.0}"], "quantize.percentile", "quantize.observer is minmax"),
    ],
)
def test_what_is_given_in_vain_is_named_with_the_reason(given, keys, reason):
    found = given_in_vain(recipe.load([], given))
    assert [names for why, names in found.items() if reason in why] == [keys.split()]
