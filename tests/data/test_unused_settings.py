"""Settings of a task that its kind does not use are refused, and no recipe has any."""

from pathlib import Path

import pytest

from pruneofa import recipe
from pruneofa.data import tasks
from pruneofa.errors import InputError
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SQUAD = "but the data of squad have the columns question, context and answers; rename the columns, and omit it"
OTHER = "but only squad uses it; omit it"


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [
        ("squad", "text", "body", SQUAD),
        ("squad", "label", "answer", SQUAD),
        ("mine", "stride", 0, OTHER),
        ("sst2", "stride", 64, OTHER),
        ("mine", "skip_bad_answers", True, OTHER),
    ],
)
def test_a_setting_of_the_other_kind_of_task(name, key, value, reason):
    spec = recipe.Task(data="nowhere.csv", max_length=32, **{key: value})
    with pytest.raises(InputError) as error:
        tasks.load_task(name, spec, tiny_tokenizer())
    assert str(error.value) == f"tasks.{name}.{key} is {value!r}, {reason}"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("results/*/recipe.yaml")]), ids=str)
def test_no_recipe_has_one(path):
    for name, spec in recipe.load([path]).tasks.items():
        resolved = recipe.Task(**spec.resolved(name).model_dump())
        tasks._refuse_unused(name, resolved.resolved(name), name)
