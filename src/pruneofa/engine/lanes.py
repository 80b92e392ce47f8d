"""How a batch is divided: sequences into parts, and threads into lanes, which compute parts without waiting for each
other. Results do not depend on it."""

import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pruneofa.errors import InputError

# What a pass costs, in tokens of one thread; benchmarks/lanes.py measures it.
_WEIGHTS = 24  # reading the weights once
_BARRIERS = 2.0  # meeting at the barriers of 12 layers of 768 on AMX, for each thread beyond the first
_UNEVEN = 0.08  # the share that is lost for each thread beyond the first, because the slowest is waited for
# Tokens of a part, for each thread of the lane. With more the activations do not fit a core's caches, with fewer the
# weights are read too often; measured with 12 layers of hidden size 768.
_PART = 192
_MOST_PART = 384
_MOST_TOKENS = 16384  # whose hidden states are in memory at a time


# 12 layers of 768 with dynamic scales: barriers of a pass, and weights of the linear layers.
_BASE_BARRIERS, _BASE_WEIGHTS = 121, 84_934_656
# Time of a token on AMX, relative to that on another path: there a barrier takes as long, and so costs fewer tokens.
# 12 layers of 768, 128 tokens, int8 (benchmarks/records/*-engine); paths that were not timed there, and fp32, which
# uses neither tiles nor VNNI, count as AVX2.
_SPEED = {"amx": 1.0, "avx512bf16": 0.42, "avx512vnni": 0.42, "avxvnni": 0.25}
_OTHER_SPEED = 0.2


@dataclass(frozen=True)
class Plan:
    """A division of a batch.

    Attributes:
        lanes: number of groups of threads, at least 1.
        width: number of threads of each lane, at least 1.
        parts: the indices of the sequences of each part, in the order in which lanes take them.
        spare: number of threads that no lane has, because they would cost more than they save.
    """

    lanes: int
    width: int
    parts: list[list[int]]
    spare: int = 0


def check_lanes(wanted: int | None, threads: int) -> int | None:
    """`wanted` if that many lanes can have a thread each; None stays None. Raises InputError."""
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= threads):
        raise InputError(f"lanes is {wanted!r}, wanted an integer from 1 to {threads}, the threads, or None to choose")
    return wanted


def groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of sequences to divide together, in order, as many as memory is meant for; at least one."""
    group: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if group and total + length > _MOST_TOKENS:
            yield group
            group, total = [], 0
        group.append(index)
        total += length
    if group:
        yield group


def meeting_cost(barriers: int, weights: int, isa: str, precision: str) -> float:
    """What a further thread costs a pass at its barriers, in tokens of one thread: more on a fast path.

    Args:
        barriers: of a pass.
        weights: of the linear layers, zeros included.
        isa: the path.
        precision: "int8" or "fp32".
    """
    size = _BASE_WEIGHTS / weights
    speed = _SPEED.get(isa, _OTHER_SPEED) if precision == "int8" else _OTHER_SPEED
    return _BARRIERS * barriers / _BASE_BARRIERS * size * speed


def plan(lengths: Sequence[int], threads: int, lanes: int | None = None, meeting: float = _BARRIERS) -> Plan:
    """Divide a batch so that it is done soonest, as far as the model of costs knows.

    Args:
        lengths: tokens of each sequence, at least one sequence.
        threads: the most threads to use.
        lanes: number of lanes; None: as many as pay.
        meeting: see `meeting_cost`.
    """
    if len(lengths) == 1:
        return Plan(1, width := _width(lengths[0], threads, meeting), [[0]], threads - width)
    most = min(threads, len(lengths))
    plans = (_divided(lengths, count, threads // count, meeting) for count in _counts(most, threads, lanes))
    return min(plans, key=lambda one: _cost(one, lengths, meeting))  # of equals the one with fewest lanes


def _counts(most: int, threads: int, lanes: int | None) -> Sequence[int]:
    if lanes is not None:
        return [min(lanes, most)]
    # As many as there can be of each width: with fewer, threads would be left over.
    return sorted({min(most, threads // width) for width in range(1, threads + 1)})


def _divided(lengths: Sequence[int], lanes: int, threads: int, meeting: float) -> Plan:
    """Parts of about equal numbers of tokens, as many for every lane, and as many of `threads` as pay for a lane."""
    total = sum(lengths)
    rounds = -(-total // (lanes * min(_PART * threads, _MOST_PART)))
    bins: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(min(lanes * rounds, len(lengths)))]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        tokens, number, part = bins[0]
        part.append(index)
        heapq.heapreplace(bins, (tokens + lengths[index], number, part))
    largest_first = sorted(bins, key=lambda one: (-one[0], one[1]))
    width = _width(largest_first[0][0], threads, meeting)
    return Plan(lanes, width, [part for _, _, part in largest_first], threads - width if lanes == 1 else 0)


@functools.lru_cache(4096)
def _width(tokens: int, threads: int, meeting: float) -> int:
    """How many of a lane's threads pay for its largest part."""
    return min(range(1, threads + 1), key=lambda count: _part_cost(tokens, count, meeting))


def _part_cost(tokens: int, width: int, meeting: float) -> float:
    return (_WEIGHTS + tokens) / width * (1 + _UNEVEN * (width - 1)) + meeting * (width - 1)


def _cost(made: Plan, lengths: Sequence[int], meeting: float) -> float:
    """Time until the last lane is done, when each takes the next part as soon as it can."""
    busy = [0.0] * made.lanes
    for part in made.parts:
        heapq.heapreplace(busy, busy[0] + _part_cost(sum(lengths[index] for index in part), made.width, meeting))
    return max(busy)
