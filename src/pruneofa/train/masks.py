"""Which weights are prunable, their scores, and the masks: pure functions of tensors.

Every mask has exactly the number of zeros that its sparsity requires. Scores are non-negative float32 numbers, whose
order is that of their bit patterns as integers. The exact threshold therefore follows from two histograms: one of the
upper 16 bits, then one of the lower 16 bits of the scores in the threshold's bin.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT, base_name
from pruneofa.formats.pattern import BLOCKS, is_prunable, ratio_of

# Weights processed at a time: temporaries stay in cache, and torch does not use several threads for so few, which
# made selection tens of times slower on a busy machine.
_CHUNK = 1 << 15
_WRAPPED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
_HALF = 16  # bits per histogram: first the upper 16 bits of a score, then the lower 16


def prunable(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Weights of the encoder's Linear layers and of `pooler.dense`, by full parameter name.

    The encoder may be inside a wrapper (sentence-transformers, PEFT, torch.compile). A tied weight is listed
    once; names that match a regular expression of `skip` are left out. Adapters beside a weight are not listed.
    Raises InputError for a model without encoder linears, or with several encoders, or a `skip` that is not a
    regular expression or matches nothing.
    """
    refuse_string(skip)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    path, encoder = _encoder_in(model)
    adapted = tuple(f"{name}." for name, module in encoder.named_modules() if _has_adapter(module))
    for module_name, module in encoder.named_modules():
        name = f"{module_name}.weight"
        canonical = base_name(_WRAPPED.sub("", name))
        wanted = is_prunable(canonical, 2)
        adapter = any(name.startswith(a) and not name.startswith(f"{a}base_layer.") for a in adapted)
        if wanted and not adapter and isinstance(module, nn.Linear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{path}{name}"] = cast(nn.Parameter, module.weight)
    if not any(unwrapped_name(name) != POOLER_WEIGHT for name in found):
        raise InputError(
            f"{type(model).__name__}: no Linear layer named {families.layer_name()}, so there is "
            f"nothing to prune; wanted a {families.titles()} model"
        )
    kept = dict(found)
    # Rules for all families may name the pooler, which some models lack, and layers that are dense anyway.
    base = getattr(model, "base_model_prefix", "")
    known = [POOLER_WEIGHT, f"{base}.{POOLER_WEIGHT}", *(name for name, _ in model.named_parameters())]
    try:
        for rule in skip:
            skipped = [name for name in found if re.search(rule, name)]
            if not skipped and not any(re.search(rule, name) for name in known):
                raise InputError(
                    f"skip: {rule!r} matches no layer, wanted part of a name such as {next(iter(found))}; correct it, "
                    "or leave it out"
                )
            for name in skipped:
                kept.pop(name, None)
    except re.error as error:
        raise InputError(f"skip: {error.pattern!r} is not a regular expression ({error}); correct it") from None
    return kept


def refuse_string(skip: Iterable[str]) -> None:
    """Raise InputError for rules that are one string, of which every letter would be a rule."""
    if isinstance(skip, str):
        raise InputError(f"skip is {skip!r}, wanted a list of regular expressions, such as [{skip!r}]")


def unwrapped_name(name: str) -> str:
    """`families.base_name` of a weight that `prunable` lists, without the name prefixes of wrappers."""
    name = base_name(_WRAPPED.sub("", name))
    return families.encoder_part(name) or name


def check_whole(weights: Mapping[str, Tensor]) -> None:
    """Raise InputError for a weight that is sharded, empty or on the meta device."""
    for name, weight in weights.items():
        sharded = isinstance(weight, DTensor) or "_fsdp_wrapped_module" in name
        if sharded or weight.is_meta or weight.numel() == 0:
            got = "sharded" if sharded else "on the meta device" if weight.is_meta else "empty"
            raise InputError(
                f"{name}: the parameter is {got}, wanted a whole tensor; FSDP, tensor parallelism and ZeRO-3 are not "
                "supported: train with one process or DDP"
            )


def _encoder_in(model: nn.Module) -> tuple[str, nn.Module]:
    """(prefix of its names, the one supported transformers model in `model`); `model` itself where there is none."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if not inside and isinstance(module, PreTrainedModel) and module.base_model_prefix in families.prefixes():
            found[name] = module
    if len(found) > 1:
        raise InputError(
            f"{type(model).__name__}: {len(found)} encoders ({', '.join(found)}), wanted one; "
            f"give a model with a single {families.titles()}"
        )
    for name, module in found.items():
        return (f"{name}." if name else ""), module
    return "", model


def _has_adapter(module: nn.Module) -> bool:
    """Whether this module is a PEFT wrapper, which holds the original Linear as `base_layer`."""
    return "base_layer" in dict(module.named_children())


def final_of(pattern: str) -> float | None:
    """The final sparsity of an n:m pattern, 1 - n/m; None for other patterns. Raises InputError if unknown."""
    ratio = _ratio(pattern)
    return 1 - ratio[0] / ratio[1] if ratio else None


def check_shape(name: str, shape: tuple[int, ...], pattern: str) -> None:
    """Raise InputError naming the layer when an (out, in) weight does not divide into `pattern`'s blocks."""
    rows, columns = (1, ratio[1]) if (ratio := _ratio(pattern)) else BLOCKS[pattern]
    if len(shape) != 2 or shape[0] % rows or shape[1] % columns:
        raise InputError(
            f"{name}: shape {'x'.join(map(str, shape))} (out x in) does not divide into {pattern} groups of "
            f"{rows} output rows x {columns} inputs; choose another pattern or skip the layer"
        )


def magnitude_mask(weight: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """Bool mask, True = kept, of an (out, in) weight of any float dtype: the smallest magnitudes are pruned.

    `pattern` is unstructured; 4x1 (4 consecutive output rows) or 1x4 (4 consecutive inputs), scored by the
    mean magnitude of the block; or n:m, at most n kept of m consecutive inputs, where a sparsity below
    1 - n/m prunes only a share of the groups. Exactly int(sparsity * count) units are pruned, ties by position.
    Raises InputError for a sparsity outside [0, 1), above an n:m pattern's, or a shape that does not divide.
    """
    return next(global_masks({"weight": weight}, sparsity, pattern))[1]


def global_masks(
    weights: Mapping[str, Tensor], sparsity: float, pattern: str = "unstructured"
) -> Iterator[tuple[str, Tensor]]:
    """Yield the masks of `magnitude_mask` with one common threshold for all `weights`, layer by layer.

    Exactly int(sparsity * total) units are pruned in all; ties are broken by order of layers, then by position.
    """
    fraction = _fraction(sparsity, pattern)
    for name, weight in weights.items():
        check_shape(name, tuple(weight.shape), pattern)
    threshold, ties = _threshold(list(weights.values()), fraction, pattern)
    for name, weight in weights.items():
        kept, ties = _kept(weight, pattern, threshold, ties)
        yield name, kept


def unit_scores(weight: Tensor, pattern: str) -> Tensor:
    """Scores of the units that are pruned as a whole, a new contiguous float32 (units,).

    A unit is a weight (score |w|), a block (mean magnitude), or an n:m group (sum of its m - n smallest magnitudes,
    which pruning would remove).
    """
    magnitude = weight.detach().float().abs().contiguous()
    if ratio := _ratio(pattern):
        kept, group = ratio
        return magnitude.view(-1, group).topk(group - kept, dim=1, largest=False).values.sum(1)
    rows, columns = BLOCKS[pattern]
    if rows == columns == 1:
        return magnitude.flatten()
    height, width = magnitude.shape
    return magnitude.view(height // rows, rows, width // columns, columns).mean((1, 3)).flatten()


def _expand(pruned_units: Tensor, weight: Tensor, pattern: str) -> Tensor:
    """Spread bool (units,) over the (out, in) weight: True = pruned."""
    height, width = weight.shape
    if ratio := _ratio(pattern):
        kept, group = ratio
        order = weight.detach().abs().reshape(-1, group).argsort(dim=1, stable=True)
        smallest = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : group - kept], True)
        return smallest.logical_and_(pruned_units[:, None]).view(height, width)
    rows, columns = BLOCKS[pattern]
    if rows == columns == 1:
        return pruned_units.view(height, width)
    blocks = pruned_units.view(height // rows, 1, width // columns, 1)
    return blocks.expand(-1, rows, -1, columns).reshape(height, width)


def _kept(weight: Tensor, pattern: str, threshold: int, ties: int) -> tuple[Tensor, int]:
    """Prune the units below `threshold` and the first `ties` equal to it.

    Returns bool of the weight's shape, True = kept, and how many ties are left for later layers.
    """
    kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for source, target in zip(_chunks(weight, pattern), _chunks(kept, pattern), strict=True):
        bits = unit_scores(source, pattern).view(torch.int32)
        pruned = bits < threshold
        if ties:
            equal = (bits == threshold).nonzero().flatten()[:ties]
            pruned[equal] = True
            ties -= len(equal)
        torch.logical_not(_expand(pruned, source, pattern), out=target)
    return kept, ties


def _chunks(weight: Tensor, pattern: str) -> tuple[Tensor, ...]:
    """Slices of rows, in order, that do not split a unit; on a GPU the whole weight is one slice."""
    if weight.device.type != "cpu":
        return (weight,)
    rows = 1 if _ratio(pattern) else BLOCKS[pattern][0]
    return weight.split(max(1, _CHUNK // (rows * weight.shape[1])) * rows)


def _threshold(weights: list[Tensor], fraction: float, pattern: str) -> tuple[int, int]:
    """The threshold's bit pattern: units below it are pruned, and as many of the units equal to it as returned too."""
    upper = torch.zeros(1 << (_HALF - 1), dtype=torch.int64)
    for bits in _bits(weights, pattern):
        upper += torch.bincount((bits >> _HALF).short(), minlength=len(upper)).cpu()
    count = int(fraction * int(upper.sum()))
    if count == 0:
        return 0, 0
    high, before = _bin_of(upper, count)
    lower = torch.zeros(1 << _HALF, dtype=torch.int64)
    for bits in _bits(weights, pattern):  # few scores share their upper half with the threshold
        found = (bits[bits >> _HALF == high] & 0xFFFF).long().cpu()
        lower.put_(found, torch.ones_like(found), accumulate=True)
    low, before_low = _bin_of(lower, count - before)
    threshold, ties = high << _HALF | low, count - before - before_low
    return (threshold + 1, 0) if ties == lower[low] else (threshold, ties)


def _bits(weights: list[Tensor], pattern: str) -> Iterator[Tensor]:
    """The bits of all scores, int32, chunk by chunk."""
    for weight in weights:
        for chunk in _chunks(weight, pattern):
            yield unit_scores(chunk, pattern).view(torch.int32)


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the item of this rank (from 1), and the number of items in the bins before it."""
    cumulated = counts.cumsum(0)
    index = int(torch.searchsorted(cumulated, rank))
    return index, int(cumulated[index] - counts[index])


def _ratio(pattern: str) -> tuple[int, int] | None:
    """(n, m) of an n:m pattern, None for a block pattern. Raises InputError for anything else."""
    if pattern in BLOCKS:
        return None
    ratio = ratio_of(pattern)
    if ratio is None:
        raise InputError(f"pattern is {pattern!r}; wanted unstructured, 4x1, 1x4 or n:m, 0 < n < m < 100, such as 2:4")
    return ratio


def _fraction(sparsity: float, pattern: str) -> float:
    """Share of the units to prune: the sparsity itself, or relative to the final one of an n:m pattern."""
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity} but must be at least 0 and below 1 (a fraction, not percent)")
    final = final_of(pattern)
    if final is None:
        return sparsity
    if sparsity > final + 1e-9:
        raise InputError(f"sparsity is {sparsity} but pattern {pattern} cannot exceed {final:g}; lower it")
    return min(1.0, sparsity / final) if abs(sparsity - final) > 1e-9 else 1.0
