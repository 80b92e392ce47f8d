"""Schedules: sparsity and learning rate as pure functions of the step."""

from pruneofa.errors import InputError


def cubic_sparsity(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity after `step` by the cubic schedule of Zhu and Gupta: steep at first, flat near `final`.

    It is `initial` up to `begin`, and exactly `final` from `end` on.
    Raises InputError when `begin` is not below `end`.
    """
    if begin >= end:
        raise InputError(f"sparsity schedule: begin is {begin} but must be below end ({end}); lower begin")
    if step >= end:
        return final
    remaining = (1 - max(step - begin, 0) / (end - begin)) ** 3
    return initial + (final - initial) * (1 - remaining)


def linear_lr(step: int, *, total: int, warmup: int) -> float:
    """Multiple of the peak rate: linear warm-up over `warmup` steps, then linear decay to 0 at `total`."""
    _check_decay(total - warmup, total=total, warmup=warmup)
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / (total - warmup))


def rewound_lr(step: int, *, total: int, warmup: int, begin: int, end: int, interval: int) -> float:
    """Multiple of the peak rate: linear decay that is rewound at every mask selection (sawtooth).

    Between `begin` and `end` each interval starts at the same rate, so pruning happens near the peak rate (slightly
    above it when begin + warmup are small). The decay to 0 takes place after `end`.
    Raises InputError when end - begin leaves no steps for that decay.
    """
    _check_window(begin, end, interval)
    decay = total - (end - begin)
    _check_decay(decay - warmup, total=total, warmup=warmup, window=end - begin)
    if step < warmup:
        return step / warmup
    if step < begin:
        left = decay - step
    elif step < end:
        left = decay - step + (step - begin) // interval * interval
    else:
        left = total - step
    return max(0.0, left / (decay - warmup))


def cyclic_lr(step: int, *, total: int, warmup: int, begin: int, end: int, interval: int, floor: float = 0.01) -> float:
    """Multiple of the peak rate: every interval falls from the peak to `floor` of it (Kurtic et al. 2022).

    The cycles run from `begin` to `end`; then the rate decays linearly to 0 at `total`. It stays at the peak between
    warmup and `begin`. Masks are selected after a step, so the step of a selection is the last of its cycle: the model
    that is pruned, and whose curvature is taken, is the cooled one. Raises InputError when `end` leaves no steps after
    it.
    """
    _check_window(begin, end, interval)
    _check_decay(total - max(end, warmup), total=total, warmup=warmup, window=end)
    if step <= begin:
        multiple = 1.0
    elif step <= end:
        multiple = 1 - (1 - floor) * ((step - begin - 1) % interval) / interval
    else:
        multiple = max(0.0, (total - step) / (total - end))
    return min(multiple, step / warmup) if step < warmup else multiple


def _check_window(begin: int, end: int, interval: int) -> None:
    if begin >= end:
        raise InputError(f"learning-rate rewinding: begin is {begin} but must be below end ({end}); lower begin")
    if interval < 1:
        raise InputError(f"learning-rate rewinding: interval is {interval} but must be at least 1")


def _check_decay(steps: int, *, total: int, warmup: int, window: int = 0) -> None:
    if steps <= 0:
        taken = f"warmup ({warmup})" + (f" and rewinding ({window})" if window else "")
        raise InputError(f"learning rate: {taken} leave none of {total} steps for the decay; raise steps or lower end")
