"""Masked-language-model (and next-sentence) examples, each a pure function of (seed, epoch, example).

Nothing here draws from a global generator, so the order in which items are asked for, and by how many
workers, does not change them, and a resumed run sees what an uninterrupted one would have seen.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pruneofa.errors import InputError
from pruneofa.recipe import Corpus
from pruneofa.train.corpus import Encoder, Store, chunk, chunk_targets, continuations, vocabulary_size

IGNORED = -100  # label of a position that is not predicted
MASKED = 0.15  # share of positions that are predicted: 80 % hidden, 10 % replaced, 10 % left as they are
PARTNER_TRIES = 8
_WORD = (1 << 64) - 1
_EXTRA = 4 + PARTNER_TRIES  # uniforms an item uses beside those for masking

Item = dict[str, Any]


@dataclass(frozen=True)
class ExampleFormat:
    """What an example looks like: lengths, special ids, and which ids may be masked."""

    spec: Corpus
    cls: int
    sep: int
    mask: int
    vocabulary: int
    special: np.ndarray  # bool (vocabulary,): never masked
    continuation: np.ndarray  # bool (vocabulary,): continues a word

    @classmethod
    def of(cls, spec: Corpus, tokenizer: Any) -> "ExampleFormat":
        """Read special tokens from a transformers tokenizer. Raises InputError if one is missing."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError("the model's tokenizer has no tokenizer.json; save it with a fast tokenizer")
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        for name, index in (("cls", first), ("sep", last), ("mask", tokenizer.mask_token_id)):
            if index is None:
                raise InputError(f"the model's tokenizer has no {name} token, which masked-language training needs")
        size = vocabulary_size(backend)
        special = np.zeros(size, bool)
        special[tokenizer.all_special_ids] = True
        return cls(spec, first, last, tokenizer.mask_token_id, size, special, continuations(backend))

    def uniforms(self, seed: int, epoch: int, index: int) -> np.ndarray:
        """All randomness of one item: float64 (_EXTRA + 3 * max_length,) in [0, 1)."""
        key = np.array([_mix(_mix(seed) + epoch), index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).random(_EXTRA + 3 * self.spec.max_length)

    def item(self, first: np.ndarray, second: np.ndarray | None, random_second: bool, draws: np.ndarray) -> Item:
        """Join one or two segments, truncate them to max_length and mask them.

        Args:
            first: ids (n,) of segment A, or of the whole document.
            second: ids (m,) of segment B, None without next-sentence prediction.
            random_second: whether B comes from another article (next_sentence_label 1).
            draws: uniforms of this item.
        """
        if second is None:
            n = min(len(first), self.spec.max_length - 2) + 2
            ids = np.empty(n, np.int64)
            ids[0], ids[1:-1], ids[-1] = self.cls, first[: n - 2], self.sep
            return self.masked(ids, draws)
        a, b = truncated(len(first), len(second), self.spec.max_length - 3)
        ids = np.empty(a + b + 3, np.int64)
        ids[0], ids[1 : a + 1], ids[a + 1] = self.cls, first[:a], self.sep
        ids[a + 2 : -1], ids[-1] = second[:b], self.sep
        types = np.zeros(len(ids), np.int64)
        types[a + 2 :] = 1
        item = self.masked(ids, draws)
        return {**item, "token_type_ids": types, "next_sentence_label": int(random_second)}

    def masked(self, ids: np.ndarray, draws: np.ndarray) -> Item:
        """Hide 15 % of `ids` (n,) int64 in place; at least one position, so that every item has a loss."""
        n, longest = len(ids), self.spec.max_length
        select, action, random = (draws[_EXTRA + k * longest :][:n] for k in range(3))
        if self.spec.whole_word:
            select = select[np.cumsum(~self.continuation[ids]) - (not self.continuation[ids[0]])]
        chance = np.where(self.special[ids], 2.0, select)
        chosen = np.flatnonzero(chance < MASKED)
        if not len(chosen):
            lowest = int(chance.argmin())
            chosen = np.array([lowest] if chance[lowest] < 1 else [], np.int64)
        labels = np.full(n, IGNORED, np.int64)
        labels[chosen] = ids[chosen]
        action = action[chosen]
        hidden, replaced = chosen[action < 0.8], chosen[action >= 0.9]
        ids[hidden] = self.mask
        ids[replaced] = (random[replaced] * self.vocabulary).astype(np.int64)
        return {"input_ids": ids, "labels": labels}


def truncated(first: int, second: int, longest: int) -> tuple[int, int]:
    """Lengths after dropping tokens from the end of whichever segment is longer until both fit."""
    while (over := first + second - longest) > 0:
        if first > second:
            first -= min(over, first - second)
        elif second > first:
            second -= min(over, second - first)
        else:
            first, second = (longest + 1) // 2, longest // 2
    return first, second


def segment(tokens: np.ndarray, starts: np.ndarray, low: int, high: int, target: int, draw: float) -> np.ndarray:
    """From a random sentence of sentences [low, high) on, as many as reach `target` tokens (at least one)."""
    first = low + int(draw * (high - low))
    begin = int(starts[first])
    last = first + 1 + int(np.searchsorted(starts[first + 1 : high + 1], begin + max(target, 1)))
    return tokens[begin : int(starts[min(last, high)])]


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` goes in a permutation of range(size) given by `key`; constant time and memory.

    A Feistel network permutes the next power of four; results outside the range are permuted again.
    """
    half = ((size - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(4):
            left, right = right, left ^ (_mix(key + turn * 0x632BE59BD9B4E019 + right) & low)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """splitmix64: a hash of a 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _WORD
    return value ^ value >> 31


class PretrainingDataset(Dataset[Item]):
    """`size` examples from the cache: position -> (epoch, permuted example) -> item, a pure function.

    Items: input_ids int64 (n,), labels int64 (n,) with -100 where nothing is predicted, and with nsp
    token_type_ids int64 (n,) and next_sentence_label (1: the second segment comes from another article).
    """

    def __init__(self, form: ExampleFormat, store: Store, split: str, size: int, seed: int, epoch0: int) -> None:
        self.form, self.store, self.split, self.size = form, store, split, size
        self.seed, self.epoch0 = seed, epoch0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("form", "store", "split", "size", "seed", "epoch0")
        return {name: self.__dict__[name] for name in kept}

    @functools.cached_property
    def _spans(self) -> np.ndarray:
        return self.store.table(self.split, "spans")

    @functools.cached_property
    def _targets(self) -> np.ndarray:
        return self.store.table(self.split, "targets")

    @functools.cached_property
    def _articles(self) -> np.ndarray:
        return self.store.table(self.split, "articles")

    def __len__(self) -> int:
        return self.size

    def place(self, position: int) -> tuple[int, int]:
        """(epoch, example) of a position."""
        epoch, index = divmod(position, len(self._spans))
        epoch += self.epoch0
        return epoch, permuted(index, len(self._spans), _mix(self.seed) + _mix(epoch))

    def __getitem__(self, position: int) -> Item:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of {self.size}")
        epoch, index = self.place(position)
        draws = self.form.uniforms(self.seed, epoch, index)
        starts, tokens = self.store.sentences, self.store.tokens
        first, last = self._spans[index].tolist()
        begin, end = int(starts[first]), int(starts[last])
        if not self.form.spec.nsp:
            return self.form.item(tokens[begin:end], None, False, draws)
        middle = split_point(first, last, draws)
        cut = int(starts[middle])
        random_second = bool(draws[0] < 0.5) or last - first == 1
        if random_second:
            low, high = self._other_article(first, draws)
            target = int(self._targets[index]) - (cut - begin)
            second = segment(tokens, starts, low, high, target, float(draws[3]))
        else:
            second = tokens[cut:end]
        return self.form.item(tokens[begin:cut], second, random_second, draws)

    def _other_article(self, sentence: int, draws: np.ndarray) -> tuple[int, int]:
        """First and one-past-last sentence of a random article that does not contain `sentence`."""
        documents = self.store.documents
        # A split of one article (a corpus of two or three) borrows the partner from the whole corpus.
        articles: Sequence[int] | np.ndarray = self._articles if len(self._articles) > 1 else range(len(documents) - 1)
        count = len(articles)
        rank = 0
        for draw in draws[4 : 4 + PARTNER_TRIES].tolist():
            rank = int(draw * count)
            low, high = documents[articles[rank] : articles[rank] + 2].tolist()
            if not low <= sentence < high:
                return low, high
        article = articles[(rank + 1) % count]
        low, high = documents[article : article + 2].tolist()
        return low, high


def split_point(first: int, last: int, draws: np.ndarray) -> int:
    """The sentence at which segment B would start: at least one sentence before it and, if possible, after it."""
    return last if last - first == 1 else first + 1 + int(draws[1] * (last - first - 1))


class StreamingDataset(IterableDataset[Item]):
    """`size` examples read and tokenized on the way, for a corpus too large to keep.

    Examples come from a shuffle buffer, partners from a reservoir of earlier articles; both are seeded, so
    two runs see the same items. DataLoader workers share the articles by their number.
    """

    BUFFER = 4096
    RESERVOIR = 1024

    def __init__(
        self,
        form: ExampleFormat,
        texts: Callable[[], Iterator[str]],
        encoder: Encoder,
        held_out: Callable[[int], bool],
        split: str,
        size: int,
        seed: int,
    ) -> None:
        self.form, self.texts, self.encoder, self.held_out = form, texts, encoder, held_out
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        rank, workers = (info.id, info.num_workers) if info else (0, 1)
        size = len(range(rank, self.size, workers))
        rng = np.random.Generator(np.random.Philox(key=[_mix(self.seed), rank]))
        buffer: list[Item] = []
        made = 0
        for item in self._items(rank, workers, rng):
            if len(buffer) < min(self.BUFFER, size):
                buffer.append(item)
                continue
            place = int(rng.integers(len(buffer)))
            buffer[place], item = item, buffer[place]
            yield item
            made += 1
            if made == size:
                return

    def _items(self, rank: int, workers: int, rng: np.random.Generator) -> Iterator[Item]:
        spec = self.form.spec
        reservoir: list[tuple[np.ndarray, np.ndarray]] = []
        seen = example = 0
        targets = chunk_targets(spec, self.seed)
        for epoch, tokens, starts in self._articles(rank, workers):
            begin, *ends = starts.tolist()
            # The partners are the articles before this one, so the very first article can only wait.
            if reservoir or not spec.nsp:
                for first, last, target in chunk(ends, begin, targets):
                    draws = self.form.uniforms(self.seed, epoch, example * workers + rank)
                    example += 1
                    yield self._item(tokens, starts, (first, last, target), reservoir, draws)
            seen += 1
            if len(reservoir) < self.RESERVOIR:
                reservoir.append((tokens, starts))
            elif (place := int(rng.integers(seen))) < self.RESERVOIR:
                reservoir[place] = (tokens, starts)

    def _item(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        span: tuple[int, int, int],
        reservoir: list[tuple[np.ndarray, np.ndarray]],
        draws: np.ndarray,
    ) -> Item:
        first, last, target = span
        begin, end = int(starts[first]), int(starts[last])
        if not self.form.spec.nsp:
            return self.form.item(tokens[begin:end], None, False, draws)
        cut = int(starts[split_point(first, last, draws)])
        random_second = bool(draws[0] < 0.5) or last - first == 1
        second = tokens[cut:end]
        if random_second:
            other, bounds = reservoir[int(draws[4] * len(reservoir))]
            second = segment(other, bounds, 0, len(bounds) - 1, target - (cut - begin), float(draws[3]))
        return self.form.item(tokens[begin:cut], second, random_second, draws)

    def _articles(self, rank: int, workers: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(epoch, tokens, sentence starts) of the articles of this split and worker, again and again."""
        epoch = 0
        while True:
            found = False
            for number, text in enumerate(self.texts()):
                if number % workers != rank:
                    continue
                encoded = self.encoder([text])
                if len(encoded.hashes) and self.held_out(int(encoded.hashes[0])) == (self.split == "validation"):
                    found = True
                    yield epoch, encoded.ids, np.concatenate([[0], np.cumsum(encoded.sentences)])
            if not found:
                raise InputError(f"no article for the {self.split} split in the stream; it needs more articles")
            epoch += 1


def collate(items: Sequence[Item], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack items, padded to the longest: int64 (batch, n) tensors, attention_mask, next_sentence_label (batch,)."""
    longest = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": pad_token_id, "token_type_ids": 0, "labels": IGNORED}
    batch = {name: np.full((len(items), longest), value) for name, value in fill.items() if name in items[0]}
    batch["attention_mask"] = np.zeros((len(items), longest), np.int64)
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        batch["attention_mask"][row, :n] = 1
        for name in fill:
            if name in batch:
                batch[name][row, :n] = item[name]
    if "next_sentence_label" in items[0]:
        batch["next_sentence_label"] = np.array([item["next_sentence_label"] for item in items])
    return {name: torch.from_numpy(values) for name, values in batch.items()}
