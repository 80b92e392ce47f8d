"""The heads of a model for pre-training: masked words, and the next sentence."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pruneofa import families
from pruneofa.errors import InputError


def vocabulary_head(model: PreTrainedModel) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
    """The two halves of a masked-language head: what comes before the decoder, and the decoder itself.

    Raises:
        InputError: `model` has no such head.
    """
    family = families.of(model.config.model_type)
    head = family.masked_lm
    try:
        dense, norm = model.get_submodule(head.dense), model.get_submodule(head.norm)
        decoder = cast(nn.Linear, model.get_submodule(head.decoder))
    except AttributeError:
        raise InputError(
            f"{type(model).__name__} has no masked-language head ({head.decoder}); load it with AutoModelForPreTraining"
        ) from None
    activation = ACT2FN[head.activation or getattr(model.config, family.keys.activation)]
    return (lambda hidden: norm(activation(dense(hidden)))), decoder


def next_sentence_head(model: PreTrainedModel) -> nn.Module | None:
    """The linear layer of next-sentence prediction; None if the model has none."""
    name = families.of(model.config.model_type).next_sentence
    return dict(model.named_modules()).get(name) if name else None


def next_sentence_logits(model: PreTrainedModel, pooled: Tensor) -> Tensor:
    """Logits (batch, 2) of the pooler's output (batch, hidden), by a model that has `next_sentence_head`."""
    head = next_sentence_head(model)
    assert head is not None
    return head(pooled)
