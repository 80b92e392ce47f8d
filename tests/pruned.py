"""Sparse models in folders, and changes to their tensors."""

import torch
from safetensors.torch import load_file, save_file

from pruneofa.train.masks import magnitude_mask, prunable


def make_sparse(model, sparsity=0.9):
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.masked_fill_(~magnitude_mask(weight, sparsity), 0.0)
    return model


def change(folder, edit):
    """Rewrite the tensors of a folder through `edit(dict)`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
