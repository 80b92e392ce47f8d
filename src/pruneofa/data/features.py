"""Token features of a split, their order in training, and batches of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pruneofa.data import squad

BUCKET = 50  # batches within which examples are sorted by length
FULL_LENGTH = 128  # tokens of the rows that the size of an evaluation batch refers to
MAX_BATCH_FACTOR = 8  # largest evaluation batch of short rows, as a multiple of its size
MAX_PADDING = 1.05  # tokens with padding for each token of an evaluation batch
Item = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """One split: the concatenated tokens of all features, and the rows they were made from.

    `len()` counts features and `[i]` gives one as numpy arrays. In classification a feature is a row; in
    question answering it is a window, and several may come from one row.

    Attributes:
        ids: (tokens,) int32.
        types: (tokens,) uint8 segment ids, or None for models without them.
        bounds: (features + 1,) int64, where each feature begins in `ids`.
        targets: (features,) int64 class ids, (features, 2) first and last answer token, or None.
        rows: the raw table.
        windows: how features relate to the rows of question answering, else None.
        cut: how many features lack the end of their text, which was longer than `max_length`.
        blank: how many features are of rows without any text.
        teacher_logits: float32, a teacher's for each feature (features, classes), in question answering for each token
            (tokens, 2) that an answer begins or ends there; None where a teacher runs in every step or there is none.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8] | None
    bounds: NDArray[np.int64]
    targets: NDArray[np.int64] | None
    rows: pa.Table
    windows: squad.Windows | None = None
    cut: int = 0
    blank: int = 0
    teacher_logits: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each feature, (features,) int64."""
        return np.diff(self.bounds)

    def __getitem__(self, index: int) -> Item:
        tokens = slice(self.bounds[index], self.bounds[index + 1])
        item: Item = {"input_ids": self.ids[tokens]}
        if self.types is not None:
            item["token_type_ids"] = self.types[tokens]
        if self.targets is not None and self.targets.ndim == 1:
            item["labels"] = int(self.targets[index])
        elif self.targets is not None:
            item["start_positions"], item["end_positions"] = map(int, self.targets[index])
        if self.teacher_logits is not None:
            item["teacher_logits"] = self.teacher_logits[index if self.windows is None else tokens]
        return item

    def train_dataset(self, batch: int, seed: int, epochs: int) -> "TrainDataset":
        """`epochs` passes over the features in shuffled batches of similar length; see `TrainDataset`."""
        return TrainDataset(self, batch, seed, epochs)


class TrainDataset(torch.utils.data.Dataset[Item]):
    """Features in training order: position → feature is a pure function of (seed, position).

    Read it in order (a sequential sampler) in batches of `batch`. Each epoch is a new permutation; within
    stretches of 50 batches features are sorted by length, so that a batch needs little padding, and then whole
    batches are shuffled. Every feature comes once per epoch; an epoch that does not divide into batches is
    filled up with the first features of its own permutation, so that no batch is short or spans two epochs.
    """

    def __init__(self, data: TaskData, batch: int, seed: int, epochs: int) -> None:
        self.data, self.batch, self.seed, self.epochs = data, batch, seed, epochs
        self.steps_per_epoch = -(-len(data) // batch)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch * self.batch

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        epoch, position = divmod(index, self.steps_per_epoch * self.batch)
        return self.data[int(self.order(epoch)[position])]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Feature indices of one epoch, (steps_per_epoch · batch,) int64."""
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a loader that prefetches needs both the old and the new epoch
                self._orders.pop(min(self._orders))
            self._orders[epoch] = self._shuffled(epoch)
        return self._orders[epoch]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        random = np.random.default_rng([self.seed, epoch])
        order = np.resize(random.permutation(len(self.data)), self.steps_per_epoch * self.batch)
        lengths = self.data.lengths
        for begin in range(0, len(order), BUCKET * self.batch):
            stretch = order[begin : begin + BUCKET * self.batch]
            stretch[:] = stretch[np.argsort(lengths[stretch], kind="stable")]
        return random.permutation(order.reshape(-1, self.batch)).reshape(-1)


def evaluation_batches(lengths: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Divide features into batches of similar length, longest first, so that running out of memory shows early.

    A batch has at most `size` times 128 tokens (or one feature), and at most 1.05 times its tokens with padding.

    Args:
        lengths: tokens of each feature, (features,) int64, at least 1.
        size: features of 128 tokens in a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        longest = int(lengths[order[begin]])
        most = min(max(size * FULL_LENGTH // longest, 1), MAX_BATCH_FACTOR * size)
        tokens = np.cumsum(lengths[order[begin : begin + most]])
        # The share of padding grows with every shorter feature, so those that fit are a prefix.
        fitting = int((longest * np.arange(1, len(tokens) + 1) <= MAX_PADDING * tokens).sum())
        yield order[begin : begin + fitting]
        begin += fitting


def collate(items: Sequence[Item], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack items, padded on the right to the longest of them and no further (docs/decisions/0019).

    Returns:
        input_ids, token_type_ids if the items have it, and attention_mask: (batch, tokens) int64; labels, or
        start_positions and end_positions: (batch,) int64; teacher_logits, if the items have it: float32 (batch,
        classes), or (batch, tokens, 2) where an item's own have a row per token.
    """
    lengths = np.array([len(item["input_ids"]) for item in items])
    width = int(lengths.max())
    batch: dict[str, torch.Tensor] = {}
    for key in items[0]:
        if key in ("input_ids", "token_type_ids"):
            padded = np.full((len(items), width), pad_token_id if key == "input_ids" else 0, np.int64)
            for row, item in zip(padded, items, strict=True):
                row[: len(item[key])] = item[key]
            batch[key] = torch.from_numpy(padded)
        elif key == "teacher_logits":
            each = [item[key] for item in items]
            if each[0].ndim == 2:
                each = [np.pad(logits, ((0, width - len(logits)), (0, 0))) for logits in each]
            batch[key] = torch.from_numpy(np.stack(each))
        else:
            batch[key] = torch.tensor([item[key] for item in items], dtype=torch.int64)
    batch["attention_mask"] = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
    return batch
