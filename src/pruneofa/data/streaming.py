"""Pre-training examples from text that is read while training, for a corpus too large to keep."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from pruneofa.data.examples import (
    PARTNER_TRIES,
    ExampleFormat,
    Item,
    chunk,
    chunk_targets,
    is_held_out,
    segment,
    split_point,
    splitmix64,
)
from pruneofa.data.tokenization import Encoder
from pruneofa.errors import InputError


@dataclass(frozen=True)
class Article:
    """One article: ids (tokens,), first token of each sentence and the total (sentences + 1,), hash of its text."""

    tokens: np.ndarray
    starts: np.ndarray
    hash: int


class StreamingDataset(IterableDataset[Item]):
    """`size` examples that are read and tokenized during training, for a corpus too large to cache.

    Examples come from a shuffle buffer, partners from a reservoir of earlier articles; both are seeded, so
    two runs see the same items. DataLoader workers share the articles by their number, and the examples in groups of
    `batch`: a worker makes its batches of its own examples, and the last ones of all would be short.
    """

    BUFFER = 4096
    RESERVOIR = 1024

    def __init__(
        self,
        form: ExampleFormat,
        texts: Callable[[], Iterator[str]],
        encoder: Encoder,
        split: str,
        size: int,
        seed: int,
        batch: int = 1,
    ) -> None:
        self.form, self.texts, self.encoder = form, texts, encoder
        self.split, self.size, self.seed, self.batch = split, size, seed, batch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        rank, workers = (info.id, info.num_workers) if info else (0, 1)
        starts = range(rank * self.batch, self.size, workers * self.batch)
        size = sum(min(self.batch, self.size - start) for start in starts)
        rng = np.random.Generator(np.random.Philox(key=[splitmix64(splitmix64(self.seed)), rank]))
        buffer: list[Item] = []
        items = self._items(rank, workers, rng)
        for _ in range(size):
            while len(buffer) < min(self.BUFFER, size):
                buffer.append(next(items))
            place = int(rng.integers(len(buffer)))
            item, buffer[place] = buffer[place], buffer[-1]
            buffer.pop()
            yield item

    def _items(self, rank: int, workers: int, rng: np.random.Generator) -> Iterator[Item]:
        """Examples of this worker's articles in reading order, without end."""
        reservoir: list[Article] = []
        targets = chunk_targets(self.form.spec, self.seed)
        seen = example = 0
        for epoch in itertools.count():
            before = example
            for article in self._articles(rank, workers):
                for span in chunk(article.starts[1:].tolist(), 0, targets):
                    draws = self.form.uniforms(self.seed, epoch, example * workers + rank)
                    item = self._item(article, span, reservoir, draws)
                    if item is not None:
                        example += 1
                        yield item
                seen += 1
                place = len(reservoir) if len(reservoir) < self.RESERVOIR else int(rng.integers(seen))
                reservoir[place : place + 1] = [article] if place < self.RESERVOIR else []
            if example == before:
                raise InputError(
                    f"the stream has too few articles for the {self.split} split"
                    + (f" of {workers} data loader workers" if workers > 1 else "")
                    + "; add text, or set corpus.streaming to false"
                )

    def _item(
        self, article: Article, span: tuple[int, int, int], reservoir: list[Article], draws: np.ndarray
    ) -> Item | None:
        """The example of a chunk, None if it needs another article and the reservoir has none yet."""
        first, last, target = span
        tokens, starts = article.tokens, article.starts
        begin, end = int(starts[first]), int(starts[last])
        if not self.form.spec.nsp:
            return self.form.item(tokens[begin:end], None, False, draws)
        cut = int(starts[split_point(first, last, draws)])
        if draws[0] >= 0.5 and last - first > 1:
            return self.form.item(tokens[begin:cut], tokens[cut:end], False, draws)
        for draw in draws[4 : 4 + PARTNER_TRIES].tolist() if reservoir else []:
            other = reservoir[int(draw * len(reservoir))]
            if other.hash != article.hash:
                sentences = len(other.starts) - 1
                second = segment(other.tokens, other.starts, 0, sentences, target - (cut - begin), float(draws[3]))
                return self.form.item(tokens[begin:cut], second, True, draws)
        return None

    def _articles(self, rank: int, workers: int) -> Iterator[Article]:
        """The articles of this split and worker, once."""
        for text in itertools.islice(self.texts(), rank, None, workers):
            encoded = self.encoder([text])
            if not len(encoded.hashes):
                continue
            if bool(is_held_out(encoded.hashes, self.form.spec.validation)[0]) == (self.split == "validation"):
                starts = np.concatenate([[0], np.cumsum(encoded.sentences)])
                yield Article(encoded.ids, starts, int(encoded.hashes[0]))
