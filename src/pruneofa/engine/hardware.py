"""The machine this runs on, for records of runs and measurements."""

import platform
import re
import subprocess
import sys
from collections.abc import Collection
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


def cache_bytes(level: int, cpus: Collection[int] = (0,), root: Path = Path("/")) -> int | None:
    """Size of all caches for data of this level that these CPUs use; None where the system does not say.

    Args:
        level: 1 to 4.
        cpus: their numbers. A cache that several of them share counts once.
        root: the root of the file system.
    """
    sizes: dict[str, int] = {}  # by the CPUs that share the cache
    for cpu in cpus:
        for folder in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
            names = ("level", "type", "size", "shared_cpu_list")
            try:
                found, kind, size, shared = ((folder / name).read_text().strip() for name in names)
            except (OSError, UnicodeDecodeError):
                continue
            if found == str(level) and kind != "Instruction" and re.fullmatch(r"[0-9]{1,9}K", size):
                sizes[shared] = int(size[:-1]) << 10
    return sum(sizes.values()) or None


def _apple_name() -> str:
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
