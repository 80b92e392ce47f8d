"""How much of each layer goes when one threshold prunes all layers together: the scope global of score hessian."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruneofa.train.masks import final_of, global_masks, magnitude_mask, prunable, unwrapped_name

Share = tuple[int, int]  # weights that are pruned, of how many


@torch.no_grad()
def layer_shares(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    final: float,
    pattern: str = "unstructured",
    skip: Iterable[str] = (),
) -> dict[str, Share]:
    """The share of every weight that one threshold over all of them prunes, by canonical name; `final` in all.

    Each weight is compared by the relative error that its layer's output has without it, the bias being fitted:
    w_ij^2 Var(x_j) / Var(y), with x the inputs and y the outputs of the dense layer.

    Args:
        model: the dense model, in evaluation mode.
        batches: {"input_ids", "attention_mask", …}, int64 (rows, tokens), on the model's device.
        final: sparsity over all weights, 0 to 1.
        pattern, skip: as in `layerwise.prune_layerwise`.
    """
    weights = prunable(model, skip)
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    spreads = _spreads(model, batches, modules)
    scores = {}
    for name, weight in weights.items():
        inputs, outputs = spreads[name]
        scores[name] = weight.float().abs() * (inputs / outputs.sum().clamp_min(1e-30)).sqrt().float()
    masks = global_masks(scores, final, pattern)
    return {unwrapped_name(name): (int((~mask).count_nonzero()), mask.numel()) for name, mask in masks}


def mask_of_share(scores: Tensor, share: Share, pattern: str = "unstructured") -> Tensor:
    """As `masks.magnitude_mask`, with the number of weights to prune: also none, or all of them."""
    pruned, total = share
    most = final_of(pattern) or 1.0
    if pruned == total:
        return torch.zeros_like(scores, dtype=torch.bool)
    return magnitude_mask(scores, min((pruned + 0.5) / total, most) if pruned else 0.0, pattern)  # it rounds down


def _spreads(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The variances of each module's inputs (in,) and outputs (out,) over the real tokens, float64."""
    sums: dict[str, list[Tensor]] = {}
    real = torch.empty(0)

    def add(name: str, given: Tensor, made: Tensor) -> None:
        if given.dim() == 3:  # the pooler gets one position of every row
            given, made = given[real], made[real]
        x, y = given.double(), made.double()
        rows = torch.tensor(float(len(x)), dtype=torch.float64)
        found = [rows, x.sum(0), x.square().sum(0), y.sum(0), y.square().sum(0)]
        sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found

    hooks = [
        module.register_forward_hook(lambda _, given, made, name=name: add(name, given[0], made))
        for name, module in modules.items()
    ]
    try:
        for batch in batches:
            real = batch["attention_mask"].bool()
            model.base_model(**batch)
    finally:
        for hook in hooks:
            hook.remove()

    def variance(rows: Tensor, total: Tensor, squares: Tensor) -> Tensor:
        return (squares / rows - (total / rows).square()).clamp_min(0)

    return {name: (variance(rows, *found[:2]), variance(rows, *found[2:])) for name, (rows, *found) in sums.items()}
