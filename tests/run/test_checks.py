"""What is refused before a stage begins."""

import math

import pytest
import torch
from transformers import BertForPreTraining

from pruneofa.errors import InputError
from pruneofa.recipe import Corpus, Distill, Prune
from pruneofa.run.checks import check_pretraining
from pruneofa.train.masks import magnitude_mask, prunable
from tests.tiny import tiny_bert, write_model

GRADUAL = {"steps": 10, "batch": 8}
ONE_SHOT = {"steps": 0, "one_shot": True}


@pytest.fixture
def check(tmp_path):
    """Check that a model of a given sparsity can be pruned as these settings say."""

    def checked(sparsity, **settings):
        model = tiny_bert(BertForPreTraining)
        with torch.no_grad():
            for weight in prunable(model).values():
                weight.masked_fill_(~magnitude_mask(weight, sparsity), 0.0)
        path = write_model(tmp_path / "model", model)
        check_pretraining(str(path), None, Prune(**settings), Distill(), Corpus(source="text.txt", max_length=32))

    return checked


@pytest.mark.parametrize("way", [GRADUAL, ONE_SHOT, ONE_SHOT | {"score": "hessian"}, GRADUAL | {"pattern": "4x1"}])
def test_a_model_is_not_pruned_to_fewer_zeros_than_it_has(check, way):
    with pytest.raises(InputError, match=r"prune.final is 0.7, but .*model has a sparsity of 0.8 already.*; raise it"):
        check(0.8, final=0.7, **way)


def test_a_ratio_cannot_be_raised(check):
    with pytest.raises(InputError, match=r"final is 0.5, .* sparsity of 0.8 already.*; choose another prune.pattern"):
        check(0.8, final=0.5, pattern="2:4", **GRADUAL)
    check(0.4, final=0.5, pattern="2:4", **GRADUAL)


@pytest.mark.parametrize("way", [GRADUAL, ONE_SHOT])
def test_a_sparsity_that_is_that_of_the_model_but_for_rounding_stays(check, way):
    check(0.7, final=0.7, **way)
    check(math.nextafter(0.7, 0), final=0.7, **way)
    check(0.7008, final=0.7, **way)
    check(0.7, final=0.71, **way)
