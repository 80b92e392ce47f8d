"""The machine of a record: its processor, the installed versions, and what it can do while a row is measured."""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

from pruneofa.engine.hardware import cache_bytes, processor
from pruneofa.engine.threads import allowed_cpus

_VERSIONS = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "deepsparse", "numpy")
_L2, _L3 = 1 << 20, 32 << 20  # bytes, where the system does not say
_MOST = 1 << 30  # bytes of the buffer in memory
CHANGE = 0.2  # a ceiling that differs by more than this before and after a row is told
# Of a set of ceilings: the key, what is limited, and the unit of the number.
FIGURES = (
    ("tera_per_second", "arithmetic", "x 10^12 operations/s"),
    ("l2_gb_per_second", "L2", "GB/s"),
    ("memory_gb_per_second", "memory", "GB/s"),
)


def machine() -> dict[str, Any]:
    """Processor, CPUs and kernels that it can run."""
    from pruneofa.engine.engine import Engine

    return {
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "isas": Engine.available_isas(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that were compared."""
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def buffers() -> dict[str, int]:
    """Bytes that are read for the two bandwidths: half of L2 by each thread; by all threads together four times the
    L3 caches of the CPUs that this process may use, at most 1 GiB.
    """
    return {
        "l2_bytes": (cache_bytes(2) or _L2) // 2,
        "memory_bytes": min(4 * (cache_bytes(3, allowed_cpus()) or _L3), _MOST),
    }


def ceilings(isa: str, precision: str, threads: int) -> dict[str, dict[str, float]]:
    """What the machine can do now, by one thread and by all.

    Each figure is the best of 25 slots of a millisecond, spread over a fifth of a second. Other programs, a lower
    clock, and other tenants of the same processor lower it, so it says in what state a measurement beside it was made.

    Args:
        isa: the path whose instructions multiply and read.
        precision: "int8" or "fp32", of the products.
        threads: the number of all threads.

    Returns:
        {"one_thread" and "all_threads": {"tera_per_second": operations of the path's products on operands in the
        first-level cache, in 10^12; "l2_gb_per_second", "memory_gb_per_second": bytes read, in 10^9}}.
    """
    from pruneofa.engine.engine import native

    size = buffers()

    def of(count: int) -> dict[str, float]:
        return {
            "tera_per_second": native.arithmetic_peak(isa, precision == "int8", count) / 1e12,
            "l2_gb_per_second": native.read_bandwidth(isa, size["l2_bytes"], count) / 1e9,
            "memory_gb_per_second": native.read_bandwidth(isa, size["memory_bytes"] // count, count) / 1e9,
        }

    one = of(1)
    return {"one_thread": one, "all_threads": of(threads) if threads > 1 else one}


def measured_peak(found: Mapping[str, Any]) -> float:
    """10^12 operations per second of all threads: the larger of before and after, because load only lowers it."""
    states = [found[when] for when in ("before", "after") if found[when]]
    return max(state["all_threads"]["tera_per_second"] for state in states)


def largest_change(found: Mapping[str, Any]) -> tuple[float, str]:
    """The largest relative change from before to after a row, 0.25 for a quarter more or a fifth less; and its text."""
    changes = [(0.0, "")]
    for threads in ("one_thread", "all_threads"):
        for key, name, unit in FIGURES if found["after"] else ():
            before, after = found["before"][threads][key], found["after"][threads][key]
            text = f"{name} of {threads.replace('_', ' ')} {before:.3g} before, {after:.3g} {unit} after"
            changes.append((max(before, after) / min(before, after) - 1, text))
    return max(changes)
