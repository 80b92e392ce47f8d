"""Masked-language-model (and next-sentence) examples, each a pure function of (seed, epoch, example).

No global random generator is used, so examples do not depend on the order of access or the number of workers, and a
resumed run sees the same examples as an uninterrupted one.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pruneofa.data.tokenization import continuations, vocabulary_size
from pruneofa.errors import InputError
from pruneofa.formats.files import read_json
from pruneofa.recipe import Corpus

IGNORED = -100  # label of a position that is not predicted
MASKED = 0.15  # share of positions that are predicted: 80 % hidden, 10 % replaced, 10 % left as they are
PARTNER_TRIES = 8
_WORD = (1 << 64) - 1
_EXTRA = 4 + PARTNER_TRIES  # uniform random numbers per item in addition to those for masking

Item = dict[str, Any]


@dataclass(frozen=True)
class ExampleFormat:
    """The format of examples: lengths, special ids, and which ids may be masked."""

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
        key = np.array([splitmix64(splitmix64(seed) + epoch), index], np.uint64)
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
            chosen = np.flatnonzero(chance <= min(chance.min(), 1.0))
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
    """Ids (n,) of as many sentences as reach `target` tokens, at least one, from a random one of [low, high) on.

    Args:
        tokens: ids of all articles, (tokens,).
        starts: first token of each sentence, int64 (sentences + 1,).
        low: the first sentence to choose from; `high` is the one after the last.
        target: number of tokens.
        draw: which sentence is first, uniform in [0, 1).
    """
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
            left, right = right, left ^ (splitmix64(key + turn * 0x632BE59BD9B4E019 + right) & low)
        index = left << half | right
        if index < size:
            return index


def splitmix64(value: int) -> int:
    """splitmix64: a hash of a 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _WORD
    return value ^ value >> 31


def is_held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Which articles are for validation, bool (articles,), by the hashes of their texts, uint64 (articles,).

    Independent of their order and of the machine.
    """
    return hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))


def chunk_targets(spec: Corpus, seed: int) -> Iterator[int]:
    """Target length of chunk 0, 1, 2, …: the maximum, or with probability short_seq_prob a random one from 2 up."""
    longest = spec.max_length - (3 if spec.nsp else 2)
    for block in itertools.count():
        rng = np.random.Generator(np.random.Philox(key=[seed, block]))
        short = rng.random(4096) < spec.short_seq_prob
        yield from np.where(short, rng.integers(2, longest, 4096, endpoint=True), longest).tolist()


def chunk(ends: list[int], begin: int, targets: Iterator[int]) -> Iterator[tuple[int, int, int]]:
    """Cut one article into (first sentence, one after the last, target): sentences until the target is reached.

    Args:
        ends: where each sentence of the article ends, in tokens.
        begin: where the article begins, in tokens.
        targets: target length of each next chunk, in tokens.
    """
    first = 0
    while first < len(ends):
        target = next(targets)
        start = ends[first - 1] if first else begin
        last = min(bisect.bisect_left(ends, start + target, first) + 1, len(ends))
        yield first, last, target
        first = last


class Store:
    """Memory-mapped arrays of a cache folder; pickled as its path only."""

    def __init__(self, folder: Path, chunks: Path) -> None:
        self.folder, self.chunks = folder, chunks
        self.dtype = np.dtype(read_json(folder / "meta.json")["dtype"])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "chunks": self.chunks, "dtype": self.dtype}

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Ids of all articles, (tokens,)."""
        return mapped(self.folder / "tokens.bin", self.dtype)

    @functools.cached_property
    def sentences(self) -> np.ndarray:
        """First token of each sentence, int64 (sentences + 1,)."""
        return mapped(self.folder / "sentences.bin", np.dtype("<i8"))

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """First sentence of each article, int64 (articles + 1,)."""
        return mapped(self.folder / "documents.bin", np.dtype("<i8"))

    def table(self, split: str, name: str) -> np.ndarray:
        """`spans` int64 (chunks, 2): first sentence and the one after the last; `targets` uint16; `articles` int64."""
        dtype = np.dtype("<u2" if name == "targets" else "<i8")
        flat = mapped(self.chunks / split / f"{name}.bin", dtype)
        return flat.reshape(-1, 2) if name == "spans" else flat


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A flat file as a memory-mapped array, (elements,) of `dtype`."""
    return np.asarray(np.memmap(path, dtype, mode="r"))  # plain arrays index several times faster than memmap


class PretrainingDataset(Dataset[Item]):
    """`size` examples from the cache: position -> (epoch, permuted example) -> item, a pure function.

    Items: input_ids int64 (n,), labels int64 (n,) with -100 where nothing is predicted, and with nsp
    token_type_ids int64 (n,) and next_sentence_label (1: the second segment comes from another article).
    """

    def __init__(self, form: ExampleFormat, store: Store, split: str, size: int, seed: int) -> None:
        self.form, self.store, self.split, self.size, self.seed = form, store, split, size, seed

    def __getstate__(self) -> dict[str, Any]:
        kept = ("form", "store", "split", "size", "seed")
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
        return epoch, permuted(index, len(self._spans), splitmix64(self.seed) + splitmix64(epoch))

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.size:
            raise IndexError(f"position {index} of {self.size}")
        epoch, example = self.place(index)
        draws = self.form.uniforms(self.seed, epoch, example)
        starts, tokens = self.store.sentences, self.store.tokens
        first, last = self._spans[example].tolist()
        begin, end = int(starts[first]), int(starts[last])
        if not self.form.spec.nsp:
            return self.form.item(tokens[begin:end], None, False, draws)
        middle = split_point(first, last, draws)
        cut = int(starts[middle])
        random_second = bool(draws[0] < 0.5) or last - first == 1
        if random_second:
            low, high = self._other_article(first, draws)
            target = int(self._targets[example]) - (cut - begin)
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
    """The sentence at which segment B would start: at least one sentence before it and, if possible, after it.

    `draws`: uniforms of the item, of which the second decides.
    """
    return last if last - first == 1 else first + 1 + int(draws[1] * (last - first - 1))


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
