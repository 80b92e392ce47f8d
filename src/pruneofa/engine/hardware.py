"""The machine this runs on, for records of runs and measurements."""

import platform
from pathlib import Path


def processor() -> str:
    """Name of the processor as the system gives it, "unknown" if it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown"
