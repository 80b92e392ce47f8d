"""The micro-batches of an optimizer step, how they are divided when memory runs out, and batches without training."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepCollate:
    """Collates the items of one optimizer step into micro-batches, and counts what the losses are divided by.

    Both are done where batches are made, on the CPU, because a GPU would have to wait for the counts.

    Attributes:
        collate: makes a batch of items.
        counts: the numbers by which the losses of a batch are divided, float64 (n,).
        micro_batch: items per forward pass.
    """

    collate: Callable[[list[Any]], Batch]
    counts: Callable[[Batch], torch.Tensor]
    micro_batch: int

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """{"batches": the micro-batches, "counts": of all of them, float64 (n + 1,), the last one tokens}.

        A micro-batch without padding has no attention mask, which lets the faster attention kernels be used.
        """
        parts = [items[begin : begin + self.micro_batch] for begin in range(0, len(items), self.micro_batch)]
        batches = [self.collate(part) for part in parts]
        tokens = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum().double()
        counts = torch.stack([self.counts(batch) for batch in batches]).sum(0).double()
        for batch in batches:
            if batch["attention_mask"].all():
                del batch["attention_mask"]
        return {"batches": batches, "counts": torch.cat([counts, tokens[None]])}


def split(batch: Batch, rows: int) -> list[Batch]:
    """A batch in parts of at most `rows` rows."""
    parts = {name: values.split(rows) for name, values in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def batches(dataset: Any, collate: Callable[[list[Any]], dict[str, torch.Tensor]], size: int) -> Iterator[Any]:
    """Collated batches of a dataset, in its order."""
    items = iter(dataset) if isinstance(dataset, IterableDataset) else (dataset[i] for i in range(len(dataset)))
    while taken := list(itertools.islice(items, size)):
        yield collate(taken)
