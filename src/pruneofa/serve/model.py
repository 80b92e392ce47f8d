"""A served model: an engine, what it is called, and the two steps of a request that need it: tokenize and compute."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine.engine import Engine
from pruneofa.engine.heads import Classification, Embedding, TokenClassification
from pruneofa.engine.inputs import as_row, check_item, finite
from pruneofa.engine.tokenizer import MAX_CONTEXT, MIN_CONTEXT, WINDOW, Side, Text, Tokens, check_text, window_count
from pruneofa.errors import InputError
from pruneofa.serve.refusal import Refused, invalid

CHARACTERS_PER_TOKEN = 4  # about, in English
STATES = 65_536  # numbers of hidden states that count as one input in flight: about 1 MB with their JSON
MAX_MASKS = 64  # of a text: each costs a product with the whole vocabulary


@dataclass(frozen=True)
class TokenIds:
    """Token ids (tokens,) with their token types."""

    ids: NDArray[Any]
    types: NDArray[Any]


Item = str | tuple[str, str] | list[int] | dict[str, str] | TokenIds

_NOT = {
    "embedding": "Model is not an embedding model",
    "classification": "Model is not a classifier model",
    "reranking": "model is not a re-ranker model",
    "token classification": "Model is not a token classification model",
    "question answering": "Model is not a question answering model",
    "masked-LM": "Model is not a masked language model",
}


class Model:
    """An engine under a name.

    Attributes:
        name: what clients call it.
        engine: what computes; its `head` belongs to the task.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine

    @property
    def reranks(self) -> bool:
        """Whether it scores a pair of texts by one number."""
        return self.engine.task == "classification" and len(self.engine.labels) == 1

    def does(self, task: str) -> bool:
        """Whether the model does a task of the engine, or "reranking"."""
        return self.reranks if task == "reranking" else self.engine.task == task

    def check_task(self, task: str) -> None:
        """Raise Refused unless the model does the task."""
        if not self.does(task):
            raise Refused("Backend", f"Backend error: {_NOT[task]}", cause="model_type")

    def windows(self, lengths: Iterable[int]) -> int:
        """About how many windows of the model's length texts of so many characters fill."""
        return sum(1 + length // (CHARACTERS_PER_TOKEN * self.engine.tokenizer.limit) for length in lengths)

    def states_of(self, items: Sequence[Item]) -> int:
        """How many places the hidden states of inputs need in memory, one place for STATES numbers."""
        tokens = sum(min(characters(item), self.engine.tokenizer.limit) for item in items)
        return tokens * self.engine.width // STATES

    def windows_of(self, items: Sequence[Item]) -> int:
        """About how many windows inputs are read in, or masks they have; 0 for a task that has neither."""
        if self.engine.task == "masked-LM":
            return sum(map(self._masks, items))
        if self.engine.task == "question answering":
            return sum(map(self._question_windows, items))
        return self.windows(map(characters, items)) if self.engine.task == "token classification" else 0

    def _question_windows(self, item: Any) -> int:
        """A long question leaves windows that each advance by a few tokens of the context."""
        question, context = (len(item[part]) // CHARACTERS_PER_TOKEN for part in ("question", "context"))
        room = max(min(WINDOW, self.engine.tokenizer.limit) - question, MIN_CONTEXT)
        return window_count(context, room)

    def _masks(self, text: Any) -> int:
        tokenizer = self.engine.tokenizer
        return 0 if tokenizer.mask_id is None else text.count(tokenizer.token(tokenizer.mask_id))

    def prompt(self, name: str | None) -> str | None:
        """The text of a prompt by its name; None for None. Raises Refused for an unknown one."""
        if name is None:
            return None
        prompts = self.engine.tokenizer.prompts
        if name not in prompts:
            raise invalid(f"prompt_name is not known; the model's prompts are: {', '.join(sorted(prompts)) or 'none'}")
        return prompts[name]

    def tokenize(
        self, items: Sequence[Item], names: Sequence[str], *, truncate: bool, side: Side | None, prompt: str | None
    ) -> list[Tokens]:
        """The sequences of some inputs: one of each, or windows with the index of their input.

        Raises:
            Refused: an input that is empty, too long, or not what the task takes.
        """
        for item in items:
            empty = item in ("", ("", "")) or (isinstance(item, list | TokenIds) and not characters(item))
            if empty or (isinstance(item, dict) and "" in item.values()):
                raise Refused("Empty", "Input validation error: `inputs` cannot be empty")
        try:
            if self.engine.task == "token classification":
                for item, name in zip(items, names, strict=True):
                    _check_windows(item, name)
                texts = [check_text(item, name) for item, name in zip(items, names, strict=True)]
                return self.engine.tokenizer.text_windows(texts, names)
            if self.engine.task in ("question answering", "masked-LM"):
                checked = [check_item(item, name, self.engine.task) for item, name in zip(items, names, strict=True)]
                if self.engine.task == "question answering":
                    for (_, context), name in zip(checked, names, strict=True):
                        _check_windows(context, f"{name}.context")
                if self.engine.task == "masked-LM":
                    for text, name in zip(checked, names, strict=True):
                        if (masks := self._masks(text)) > MAX_MASKS:
                            raise invalid(f"{name} has {masks} masks, wanted at most {MAX_MASKS}", "tokenization")
                head: Any = self.engine.head
                return head.prepare(self.engine.tokenizer, checked, names, truncate=truncate)
            return self._sequences(items, names, truncate=truncate, side=side, prompt=prompt)
        except InputError as error:
            raise invalid(str(error).replace(str(self.engine.tokenizer.folder), self.name), "tokenization") from None

    def compute(self, sequences: Sequence[Tokens], whole: Sequence[bool]) -> list[NDArray[np.float32]]:
        """What the task's head needs of each sequence, in order.

        Of an embedding model the pooled vector (hidden,), or all hidden states (tokens, hidden) where `whole` is
        true; of a classification logits (classes,); otherwise what `reduce` of the head returns. Raises InputError
        for NaN and infinity, as `Engine.predict` does.
        """
        head = self.engine.head
        found: list[Any] = [None] * len(sequences)
        for index, hidden in self.engine.hidden(sequences):
            if not isinstance(head, Embedding):
                reduced = head.reduce(hidden, sequences[index])
            else:
                reduced = hidden.copy() if whole[index] else head.pool(hidden)
            found[index] = finite(reduced)
        return list(head.logits(found)) if isinstance(head, Classification) else found

    @property
    def labels(self) -> list[str]:
        """Names of the classes of a classification of texts or tokens."""
        head = self.engine.head
        return list(head.labels) if isinstance(head, Classification | TokenClassification) else []

    def warm_up(self) -> None:
        """Compute once, so that the first request finds memory and caches ready."""
        size = min(32, self.engine.max_length)
        whole = self.engine.checked_ids([np.zeros(size, np.int32)], None)
        for _ in self.engine.hidden(whole):
            pass

    def _sequences(
        self, items: Sequence[Item], names: Sequence[str], *, truncate: bool, side: Side | None, prompt: str | None
    ) -> list[Tokens]:
        """Texts, pairs and token ids; a prompt turns ids into text again, as in text-embeddings-inference."""
        tokenizer, limit = self.engine.tokenizer, self.engine.tokenizer.limit
        side = side or tokenizer.side
        ids = {}
        texts: list[Any] = []
        for index, item in enumerate(items):
            if isinstance(item, TokenIds) or (isinstance(item, list) and prompt is None):
                row, types = (
                    (item.ids, item.types) if isinstance(item, TokenIds) else (as_row(item, names[index]), None)
                )
                if len(row) > limit and not truncate:
                    raise InputError(
                        f"{names[index]} has {len(row)} tokens, the model takes at most {limit}; shorten it, or pass "
                        "truncate=True"
                    )
                kept = slice(limit) if side == "right" else slice(-limit, None)
                try:
                    ids[index] = self.engine.checked_ids([row[kept]], None if types is None else [types[kept]])[0]
                except InputError as error:  # of the only row of a batch
                    raise InputError(re.sub(r"^input_ids\[0, ", f"{names[index]}[", str(error))) from None
            else:
                text = tokenizer.decode(item, skip_special_tokens=True) if isinstance(item, list) else item
                texts.append(_check_pair(text, names[index], self.engine.task))
        own = [name for index, name in enumerate(names) if index not in ids]
        found = iter(tokenizer.sequences(texts, own, truncate=truncate, side=side, prompt=prompt) if texts else [])
        return [ids[index] if index in ids else next(found) for index in range(len(items))]


def _check_pair(item: Any, name: str, task: str) -> Text:
    """`check_item`, but one text of a pair may be empty, as in text-embeddings-inference."""
    if isinstance(item, tuple) and len(item) == 2 and "" in item:
        first, second = (text and check_text(text, f"{name}[{index}]") for index, text in enumerate(item))
        return first, second
    return check_item(item, name, task)


def characters(item: Item) -> int:
    """Of a text, a pair or a question with its context; numbers of token ids."""
    if isinstance(item, dict):
        return sum(map(len, item.values()))
    if isinstance(item, TokenIds):
        return len(item.ids)
    return sum(map(len, item)) if isinstance(item, tuple) else len(item)


def _check_windows(text: Any, name: str) -> None:
    if len(text) > MAX_CONTEXT:
        raise invalid(f"{name} has {len(text)} characters, wanted at most {MAX_CONTEXT}; divide it", "tokenization")


def load(name: str, path: str | Path, **settings: Any) -> Model:
    """Load a model and compute with it once; `settings` go to `Engine.from_pretrained`. Raises InputError."""
    model = Model(name, Engine.from_pretrained(path, **settings))
    model.warm_up()
    return model
