"""The head of masked language modeling: the likeliest tokens at each mask."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pruneofa.engine import reference
from pruneofa.engine.inputs import finite
from pruneofa.engine.load import Float, Weights
from pruneofa.engine.tokenizer import Text, TextTokenizer, Tokens
from pruneofa.errors import InputError
from pruneofa.formats.architecture import Architecture

TOP_TOKENS = 5  # results per masked position, as in transformers' fill-mask pipeline
_VOCABULARY_BLOCK = 256  # rows of the word embeddings in float32 at a time: they stay in the second-level cache
_MASKS = 64  # of any texts at a time: making the vocabulary float costs more than one product with it


class MaskedLM:
    """The likeliest tokens at each mask; vocabulary logits are computed only at masked positions."""

    def __init__(self, weights: Weights, architecture: Architecture, tokenizer: TextTokenizer) -> None:
        family = architecture.family
        head = family.masked_lm
        self._dense = weights.dense(head.dense)
        self._norm = weights.norm(head.norm)
        self._epsilon = architecture.epsilon
        self._activation = reference.ACTIVATIONS[head.activation or architecture.activation]
        self._tied = weights.table(architecture.tables["word"])
        own = f"{head.decoder}.weight"
        self._decoder = weights.plain(own) if own in weights else None
        self._bias = weights.plain(head.bias(weights))
        for name in head.biases:
            if name in weights and not np.array_equal(weights.plain(name), self._bias):
                raise InputError(
                    f"{tokenizer.folder}: {' and '.join(head.biases)} differ, wanted one bias of the decoder under "
                    "both names; load the model in transformers and save it again"
                )
        self._tokenizer = tokenizer

    def prepare(
        self, tokenizer: TextTokenizer, texts: Sequence[Text], names: Sequence[str], *, truncate: bool
    ) -> list[Tokens]:
        """Tokens of each text.

        Raises InputError if a text has no mask token, or one that was cut off, or the tokenizer has none.
        """
        tokens = tokenizer.sequences(texts, names, truncate=truncate)
        if tokenizer.mask_id is None:
            raise InputError(
                "the tokenizer has no mask token, which a masked-LM needs; set mask_token in tokenizer_config.json"
            )
        mask = tokenizer.token(tokenizer.mask_id)
        for text, sequence, name in zip(texts, tokens, names, strict=True):
            kept = np.count_nonzero(sequence.ids == tokenizer.mask_id)
            given = sum(part.count(mask) for part in ([text] if isinstance(text, str) else text))
            if kept < given:
                raise InputError(
                    f"{name} has {given - kept} of its {given} {mask} behind the {tokenizer.limit} tokens that the "
                    "model takes, where text was cut off; shorten it"
                )
            if not kept:
                raise InputError(
                    f"{name} has no {mask}, wanted at least one; put {mask} where the model has to fill in a word"
                )
        return tokens

    def reduce(self, hidden: Float, tokens: Tokens) -> Float:
        """The masked positions, (masks, hidden)."""
        return hidden[tokens.ids == self._tokenizer.mask_id]

    def results(
        self, reduced: Sequence[Float], tokens: Sequence[Tokens], texts: Sequence[Any]
    ) -> list[list[dict[str, Any]]]:
        """For each text a list with {"label", "score", "scores": {token: score}} of each mask, best tokens first."""
        masks = np.concatenate(reduced)
        blocks = (self.probabilities(masks[begin : begin + _MASKS]) for begin in range(0, len(masks), _MASKS))
        best = (self._best_tokens(scores) for block in blocks for scores in block)
        return [list(itertools.islice(best, len(own))) for own in reduced]

    def probabilities(self, masks: Float) -> Float:
        """The probabilities of all tokens, (masks, vocabulary), at what `reduce` returned."""
        return reference.softmax(self._logits(masks))

    def _logits(self, x: Float) -> Float:
        x = self._activation(self._dense.forward(x))
        finite(np.square(x).sum(axis=1))  # LayerNorm makes numbers of what it cannot square
        x = reference.layer_norm(x, *self._norm, self._epsilon)
        logits = np.empty((len(x), len(self._bias)), np.float32)
        for begin in range(0, len(self._bias), _VOCABULARY_BLOCK):
            part = slice(begin, begin + _VOCABULARY_BLOCK)
            rows = self._tied.rows(part) if self._decoder is None else self._decoder[part]
            # Mask by mask: the sums of a product of all masks would depend on how many there are.
            for mask, vector in enumerate(x):
                logits[mask, part] = rows @ vector
        return finite(logits + self._bias)

    def _best_tokens(self, scores: Float) -> dict[str, Any]:
        best: dict[str, float] = {}
        for index in np.argsort(-scores, kind="stable"):
            # Byte-level tokens that are parts of a character can have the same text: the best one is kept.
            best.setdefault(self._tokenizer.token(int(index)), float(scores[index]))
            if len(best) == TOP_TOKENS:
                break
        label = next(iter(best))
        return {"label": label, "score": best[label], "scores": best}
