"""The machine this runs on, for records of runs and measurements."""

import platform
import subprocess
import sys
from pathlib import Path


def processor() -> str:
    """Name of the processor as the system gives it, "unknown" if it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        known.setdefault(key.strip(), value.strip())
    if named := known.get("model name"):
        return named
    if part := known.get("CPU part"):  # ARM: numbers instead of a name
        return f"ARM, implementer {known.get('CPU implementer', 'unknown')}, part {part}"
    return _apple_name() or platform.processor() or "unknown"


def _apple_name() -> str:
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
