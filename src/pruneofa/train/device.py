"""What depends on the machine: processes, shares of a batch, precision, attention, optimizer, batch sizes, free memory.

`torch.compile` is not used: a task has batches of a hundred lengths, and the gain on a GPU is not measured yet.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from pruneofa.errors import InputError
from pruneofa.progress import progress
from pruneofa.train.attention import use_bf16_attention, use_gpu_attention

ROWS = 64  # rows of 128 tokens per forward pass of an evaluation on a CPU, where more are no faster
MOST_ROWS = 2048  # the same on a GPU, where more are no faster either
BYTES_PER_ROW = 16 << 20  # of GPU memory in such a forward pass: 128 KiB per token, twice what 1024 hidden units need


def processes() -> PartialState:
    """The processes that train together: one, or those that torchrun started."""
    # Without `cpu`, accelerate treats the ranks on a machine without a GPU as independent processes.
    return PartialState(cpu=not torch.cuda.is_available())


def own_device() -> torch.device:
    """Where this process computes: its GPU, or the CPU."""
    device = processes().device
    assert device is not None
    return device


def shared_progress(description: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    """`progress` of work that every process does: one of them shows it."""
    if processes().is_main_process:
        return progress(description, total)
    return nullcontext(lambda count=1, note="": None)


def split_batch(batch: int, micro_batch: int | None) -> tuple[int, int]:
    """(examples per forward pass, forward passes per step) for `batch` examples per step over all processes.

    Raises InputError when processes and micro-batches do not divide the batch.
    """
    world = processes().num_processes
    micro = min(micro_batch or batch // world, batch // world)
    if micro == 0 or batch % (micro * world):
        raise InputError(
            f"batch is {batch}, which {world} process(es) x micro_batch {micro_batch} do not divide; "
            "choose a batch that is a multiple of both"
        )
    return micro, batch // (micro * world)


def fast_precision() -> Literal["bf16", "fp32"]:
    """bf16 if the device of training has bf16 instructions, else fp32: emulated bf16 is several times slower."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(supported is not None and supported() for supported in native) else "fp32"


def trainer_options(precision: str) -> dict[str, Any]:
    """Arguments of transformers' TrainingArguments: optimizer, precision, and how batches reach the device."""
    cuda = torch.cuda.is_available()
    return {
        "use_cpu": not cuda,
        "bf16": precision == "bf16",
        "optim": "adamw_torch_fused",  # on CPUs too: one pass over the weights instead of ten
        "dataloader_num_workers": 4 if cuda else 0,
        "dataloader_pin_memory": cuda,
        # Every process reads its own batches: dispatching would cut those of unequal micro-batches wrongly.
        "accelerator_config": {"dispatch_batches": False, "non_blocking": cuda},
    }


def prepare_models(student: PreTrainedModel, teacher: PreTrainedModel | None, precision: str) -> None:
    """Choose the attention of both models, and round a teacher's weights once where autocast would in every step."""
    cuda = torch.cuda.is_available()
    for model in (student, teacher):
        if model is not None and cuda and model.config._attn_implementation == "sdpa":
            use_gpu_attention(model)
        elif model is not None and not cuda and precision == "bf16":
            use_bf16_attention(model)
    if teacher is not None and precision == "bf16":
        for module in teacher.base_model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def evaluation_rows(device: torch.device) -> int:
    """Rows of 128 tokens per forward pass of an evaluation; on a GPU as many as half of its free memory holds."""
    if device.type != "cuda":
        return ROWS
    return min(max(_free_on(device) // 2 // BYTES_PER_ROW, 1), MOST_ROWS)


def _free_on(device: torch.device) -> int:
    """Bytes that are free on a GPU, with those that PyTorch keeps for its next tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def free_memory(root: Path = Path("/")) -> tuple[int, str]:
    """(bytes that are free where models are trained, its name): this GPU's, or what this process may still use."""
    if torch.cuda.is_available():
        return _free_on(own_device()), "this GPU"
    lines = _text(root / "proc/meminfo").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, used, details, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        allowed, taken, stat = (_text(root / "sys/fs/cgroup" / name).strip() for name in (limit, used, details))
        if allowed.isdigit() and taken.isdigit():
            parts = dict(line.split(maxsplit=1) for line in stat.splitlines())
            cache = sum(int(parts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))  # given back
            found.append(int(allowed) - int(taken) + cache)
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
