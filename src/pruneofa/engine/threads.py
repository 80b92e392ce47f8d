"""How many threads to compute with: what the user asks for, else what this process may use of the machine.

The functions that read /proc and /sys take the folder that stands for the root of the file system. What a system hides
or does not have (containers without /sys, macOS) counts as no limit.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pruneofa.errors import InputError

MOST_THREADS = 1024  # a mistyped number should not make a million threads


@dataclass(frozen=True)
class Threads:
    """A number of compute threads.

    Attributes:
        count: the number, 1 to MOST_THREADS.
        reason: where it comes from, in words.
        wanted: what the user passed; None: nothing.
    """

    count: int
    reason: str
    wanted: int | None = None


def choose_threads(
    wanted: int | None,
    *,
    environment: Mapping[str, str] = os.environ,
    cpus: Collection[int] | None = None,
    root: Path = Path("/"),
) -> Threads:
    """The number of threads of an engine.

    In this order: `wanted`; PRUNEOFA_THREADS; OMP_NUM_THREADS (of a list the first number, ignored where it is none);
    the physical cores of the CPUs that this process may run on, but no more than its quota of CPU time pays for.

    Args:
        wanted: what the user passed; None: nothing.
        environment: environment variables.
        cpus: the CPUs that this process may run on; None: asks the system.
        root: the root of the file system.

    Raises:
        InputError: `wanted` or PRUNEOFA_THREADS is no integer from 1 to MOST_THREADS.
    """
    if wanted is not None:
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= MOST_THREADS:
            raise InputError(
                f"threads is {wanted!r}, wanted an integer from 1 to {MOST_THREADS}, or None to count the cores"
            )
        return Threads(wanted, f"threads={wanted}", wanted)
    own = environment.get("PRUNEOFA_THREADS", "").strip()
    if own:
        if not re.fullmatch(r"[0-9]{1,9}", own) or not 1 <= int(own) <= MOST_THREADS:
            raise InputError(
                f"PRUNEOFA_THREADS is {own!r}, wanted an integer from 1 to {MOST_THREADS}; change or unset it"
            )
        return Threads(int(own), f"PRUNEOFA_THREADS={own}")
    openmp = re.match(r"\s*([0-9]{1,9})\s*(,|$)", environment.get("OMP_NUM_THREADS", ""))
    if openmp and int(openmp[1]) >= 1:
        return Threads(min(int(openmp[1]), MOST_THREADS), f"OMP_NUM_THREADS={openmp[1]}")
    cpus = allowed_cpus() if cpus is None else cpus
    cores, quota = physical_cores(cpus, root), cpu_quota(root)
    reason = f"{cores} physical {'core' if cores == 1 else 'cores'} of {len(cpus)} allowed CPUs"
    if quota is not None and quota < cores:
        # Threads beyond the quota stop all others for the rest of each period, so a fraction of a CPU is left unused.
        return Threads(min(max(1, math.floor(quota)), MOST_THREADS), f"a quota of {quota:g} CPUs; {reason}")
    return Threads(min(cores, MOST_THREADS), reason)


def usable_threads(quota: float | None) -> int:
    """The most threads that can run at a time now; more would only take turns.

    Args:
        quota: what `cpu_quota` gave.
    """
    cpus = len(allowed_cpus())
    return cpus if quota is None else min(cpus, max(1, math.ceil(quota)))


def allowed_cpus() -> Collection[int]:
    """The numbers of the CPUs that this thread may run on; all of the machine where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def physical_cores(cpus: Collection[int], root: Path = Path("/")) -> int:
    """The number of physical cores that `cpus` belong to; a CPU whose siblings are not known is a core of its own."""
    return len({_siblings(cpu, root) for cpu in cpus})


def _siblings(cpu: int, root: Path) -> frozenset[int]:
    """The hardware threads of the core of `cpu`."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the name before Linux 5.3
        found = _cpu_list(_read(topology / name))
        if cpu in found:
            return found
    return frozenset({cpu})


def _cpu_list(text: str) -> frozenset[int]:
    """The numbers in a list as the kernel writes it ("0-3,8"); none if it is not one."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        if found is None:
            return frozenset()
        cpus.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(cpus)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups of this process allow, the least of all levels; None: no limit."""
    limits = [
        limit
        for mount, group, read in _hierarchies(root)
        for level in (group, *group.parents)
        if level.is_relative_to(mount) and (limit := read(root / level.relative_to("/"))) is not None
    ]
    return min(limits, default=None)


def _hierarchies(root: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath, Callable[[Path], float | None]]]:
    """(mount point, folder of this process's group, reader of a level's limit) of each hierarchy that limits CPU time.

    Both versions of control groups may be mounted at once. Where the group is not below what is mounted, as in a
    container that sees its own group as the root, the mount point stands for it.
    """
    groups: dict[str, str] = {}  # path by controller, "" in version 2
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, group = line.partition(":")
        controllers, _, path = group.partition(":")
        groups |= dict.fromkeys(controllers.split(","), path)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2" and "" in groups:
            path, read = groups[""], _limit_v2
        elif kinds[0] == "cgroup" and "cpu" in kinds[2].split(",") and "cpu" in groups:
            path, read = groups["cpu"], _limit_v1
        else:
            continue
        mounted, mount = (PurePosixPath(field.replace("\\040", " ")) for field in fields[3:5])
        inside = PurePosixPath(path)
        below = inside.is_relative_to(mounted) and ".." not in inside.parts
        yield mount, mount / inside.relative_to(mounted) if below else mount, read


def _limit_v2(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _limit_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    """None for "max" and -1, which mean no limit, and for what is no number."""
    if re.fullmatch(r"[0-9]{1,18}", quota) and re.fullmatch(r"[0-9]{1,18}", period) and int(quota) and int(period):
        return int(quota) / int(period)
    return None


def _read(file: Path) -> str:
    """The text of a file; "" if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
