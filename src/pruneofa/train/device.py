"""The processes that train together, and each one's share of a batch."""

import torch
from accelerate import PartialState

from pruneofa.errors import InputError


def processes() -> PartialState:
    """The processes that train together: one, or those that torchrun started."""
    # Without `cpu`, accelerate treats the ranks on a machine without a GPU as independent processes.
    return PartialState(cpu=not torch.cuda.is_available())


def split_batch(batch: int, micro_batch: int | None) -> tuple[int, int]:
    """(examples per forward pass, accumulation steps) for `batch` examples per step over all processes."""
    world = processes().num_processes
    micro = min(micro_batch or batch // world, batch // world)
    if micro == 0 or batch % (micro * world):
        raise InputError(
            f"batch is {batch}, which {world} process(es) x micro_batch {micro_batch} do not divide; "
            "choose a batch that is a multiple of both"
        )
    return micro, batch // (micro * world)
