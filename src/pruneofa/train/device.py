"""The processes that train together, each one's share of a batch, the fast precision and the free memory."""

from pathlib import Path
from typing import Literal

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


def fast_precision() -> Literal["bf16", "fp32"]:
    """bf16 if this machine has bf16 instructions, else fp32: emulated bf16 is several times slower."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "bf16"
    native = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(supported is not None and supported() for supported in native) else "fp32"


def free_memory(root: Path = Path("/")) -> tuple[int, str]:
    """(bytes that are free where models are trained, its name): this GPU's, or what this process may still use."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(processes().device)[0], "this GPU"
    lines = _text(root / "proc/meminfo").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        allowed, taken = (_text(root / "sys/fs/cgroup" / name).strip() for name in (limit, used))
        if allowed.isdigit() and taken.isdigit():
            found.append(int(allowed) - int(taken))
    return (max(min(found), 0) if found else 2**63), "this machine"


def refuse_more_than_free(needed: int, what: str, do: str) -> None:
    """Raises InputError when `what` needs more bytes than are free; `do` is what helps."""
    free, where = free_memory()
    if needed > free:
        raise InputError(
            f"{what} need {needed / 1e9:.1f} GB beside the model, but {where} has {free / 1e9:.1f} GB free; {do}, or "
            "use a machine with more"
        )


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
