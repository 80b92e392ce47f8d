"""Attention for training: for bfloat16 on a CPU one that is faster than PyTorch's, on a GPU PyTorch's without waiting.

On a CPU, `scaled_dot_product_attention` computes its backward pass, and with dropout the forward pass too, mostly
without the matrix units. Written as separate bfloat16 operations, a whole training step takes a quarter to a half less
time (`benchmarks/attention.py`). In float32 and on GPUs PyTorch's implementation is faster.

On a GPU, transformers reads every mask back to see whether it is all ones, in order to choose the flash kernel, and the
CPU waits for that. Here a batch without padding has no mask (`micro_batches.py`), so that no mask has to be read.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "pruneofa_bf16"
GPU_NAME = "pruneofa_sdpa"


def bf16_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling)·v in the interface of transformers' attention functions.

    Args:
        module: the attention layer that calls this function.
        query: (batch, heads, seq, head), any float dtype; dtypes other than bfloat16 are passed on to PyTorch.
        key: the same shape.
        value: the same shape.
        attention_mask: bool, broadcastable to (batch, heads, seq, seq), True where a position is attended to; or None.
        dropout: probability at which attention weights are dropped.
        scaling: factor of the scores; 1/√head where None.
        options: passed on.

    Returns:
        (batch, seq, heads, head) in the query's dtype, and None in place of the attention weights.
    """
    if query.dtype != torch.bfloat16 or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    with torch.autocast(query.device.type, enabled=False):  # it would take softmax to float32 and back
        scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(-1, -2))
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(torch.softmax(scores, dim=-1), dropout, training=dropout > 0)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def mask_without_reading(*args: Any, **options: Any) -> Tensor | None:
    """transformers' mask for PyTorch's attention, left out only where no mask is given, never after reading one."""
    skip = options.get("allow_is_bidirectional_skip", False) and options.get("attention_mask") is None
    return sdpa_mask(*args, **options | {"allow_is_bidirectional_skip": skip})


AttentionInterface.register(NAME, bf16_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(GPU_NAME, sdpa_attention_forward)
AttentionMaskInterface.register(GPU_NAME, mask_without_reading)


def use_bf16_attention(model: PreTrainedModel) -> None:
    """Make `model` use `bf16_attention` from now on; the setting is not saved with the model."""
    model.set_attn_implementation(NAME)


def use_gpu_attention(model: PreTrainedModel) -> None:
    """Make `model` use PyTorch's attention without reading masks back; the setting is not saved with the model."""
    model.set_attn_implementation(GPU_NAME)
