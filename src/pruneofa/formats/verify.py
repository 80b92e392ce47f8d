"""Whether every zero of a stored model is zero in another, each packed or an ordinary folder. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats import packed
from pruneofa.formats.manifest import is_packed
from pruneofa.formats.pattern import check_config, is_prunable, no_encoder, stored_tensors
from pruneofa.formats.tensors import StoredTensor, read_tensor, weights_folder


@dataclass(frozen=True)
class _Weight:
    """A linear weight, read only when it is compared, so that one dense layer at a time is in memory.

    `read` gives its values, `pruned` the bool array of its pattern's zeros: of a packed weight what its bitmask leaves
    out, since a weight that it keeps may be 0 in int8.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    pruned: Callable[[], np.ndarray]


def verify(base: str | Path, derived: str | Path) -> dict[str, Any]:
    """Check that every zero of BASE's pattern is exactly zero in DERIVED (folders or hub ids, packed or not).

    Returns "ok"; "revived" [{"layer", "count"}], weights that are zero in BASE but not in DERIVED, with the
    pooler if both have one; "not_finite" [{"layer", "count"}], weights of DERIVED that are NaN or infinite;
    "missing", encoder layers of BASE that DERIVED lacks; "missing_pooler" (not a failure: question-answering
    models have none); "checked", zeros of BASE that were compared; "extra_zeros", zeros of DERIVED that BASE does
    not have, such as weights that int8 rounds to zero; "negative_zeros", -0.0 among the checked; and the number of
    "layers". ok = nothing revived, not finite or missing. Raises InputError for models of different shapes or without
    encoder linears, and as `pattern.read_weights` and `packed.read` do.
    """
    wanted, found = _weights(base), _weights(derived)
    _check_config(base)
    revived: list[dict[str, Any]] = []
    not_finite: list[dict[str, Any]] = []
    checked = extra = negative = 0
    common = [name for name in wanted if name in found]
    for name in common:
        if wanted[name].shape != found[name].shape:
            shapes = ["x".join(map(str, model[name].shape)) for model in (wanted, found)]
            raise InputError(f"{name}: shape {shapes[1]} in {derived}, but {shapes[0]} in {base}; wanted equal shapes")
    for name in common:
        pruned, weight = wanted[name].pruned(), found[name].read()
        nonzero = weight != 0
        finite = np.isfinite(weight)
        if bad := finite.size - int(np.count_nonzero(finite)):
            not_finite.append({"layer": name, "count": bad})
        if count := int(np.count_nonzero(nonzero & pruned & finite)):
            revived.append({"layer": name, "count": count})
        checked += int(np.count_nonzero(pruned))
        extra += int(np.count_nonzero(~nonzero & ~pruned))
        if weight.dtype.kind == "f":
            negative += int(np.count_nonzero(np.signbit(weight) & ~nonzero & pruned))
    missing = [name for name in wanted if name not in found and name != POOLER_WEIGHT]
    if not missing:
        _check_config(derived)
    return {
        "ok": not (revived or not_finite or missing),
        "revived": revived,
        "not_finite": not_finite,
        "missing": missing,
        "missing_pooler": POOLER_WEIGHT in wanted and POOLER_WEIGHT not in found,
        "checked": checked,
        "extra_zeros": extra,
        "negative_zeros": negative,
        "layers": len(common),
    }


def _weights(path: str | Path) -> dict[str, _Weight]:
    """Encoder linears and the pooler of a model, sorted by canonical name."""
    folder = weights_folder(path)
    if is_packed(folder):
        linears = sorted(packed.read(folder).linears.items())
        return {name: _Weight(linear.shape, linear.dense, partial(_left_out, linear)) for name, linear in linears}
    stored = {
        name: _Weight(tensor.shape, partial(read_tensor, name, tensor), partial(_zeros, name, tensor))
        for name, tensor in sorted(stored_tensors(folder).items())
        if is_prunable(name, len(tensor.shape))
    }
    if not any(name != POOLER_WEIGHT for name in stored):
        raise InputError(no_encoder(path))
    return stored


def _left_out(linear: packed.PackedLinear) -> np.ndarray:
    return ~linear.kept


def _zeros(name: str, tensor: StoredTensor) -> np.ndarray:
    return read_tensor(name, tensor) == 0


def _check_config(path: str | Path) -> None:
    if not is_packed(weights_folder(path)):  # `packed.read` has checked that one
        check_config(path)
