"""Names of processors and sizes of caches, from what Linux says."""

from pathlib import Path

import pytest

from pruneofa.bench import machine
from pruneofa.engine import hardware

X86 = "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: another\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"), [(X86, "AMD EPYC 7B13"), (ARM, "ARM, implementer 0x41, part 0xd0c")], ids=["x86", "arm"]
)
def test_processors_are_named_as_the_system_does(monkeypatch, cpuinfo, name):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: cpuinfo)
    assert hardware.processor() == name


def test_a_system_without_a_name_gives_that_of_python(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "")
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.platform, "processor", lambda: "")
    assert hardware.processor() == "unknown"


def write_caches(root, cpu, caches):
    """Files as Linux has them: (level, type, size, CPUs that share it) of each cache."""
    for index, values in enumerate(caches):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / name).write_text(f"{value}\n")


def test_caches_are_those_that_the_system_lists(tmp_path):
    listed = [("1", "Instruction", "64K"), ("1", "Data", "32K"), ("2", "Unified", "512K"), ("3", "Unified", "8192K")]
    write_caches(tmp_path, 0, [(*values, "0") for values in (*listed, ("4", "Unified", "odd"))])
    found = [hardware.cache_bytes(level, root=tmp_path) for level in (1, 2, 3, 4, 5)]
    assert found == [32 << 10, 512 << 10, 8 << 20, None, None]
    assert hardware.cache_bytes(2, root=tmp_path / "hidden") is None


def test_a_cache_that_several_cpus_share_counts_once(tmp_path):
    """As on EPYC: an L3 for each four cores."""
    for cpu in range(12):
        first = cpu // 4 * 4
        shared = f"{first}-{first + 3}"
        write_caches(tmp_path, cpu, [("2", "Unified", "512K", cpu), ("3", "Unified", "16384K", shared)])
    for cpus, caches in ((range(12), 3), ((0, 1), 1), ((3, 4), 2), ((0, 99), 1)):
        assert hardware.cache_bytes(3, cpus, tmp_path) == caches * (16 << 20)
    assert hardware.cache_bytes(2, range(4), tmp_path) == 2 << 20


def test_the_buffer_in_memory_is_larger_than_all_last_level_caches(monkeypatch):
    found = {}
    for size in (None, 8 << 20, 384 << 20):
        monkeypatch.setattr(machine, "cache_bytes", lambda level, cpus=(0,), size=size: size)
        found[size] = machine.buffers()["memory_bytes"]
    assert found == {None: 128 << 20, 8 << 20: 32 << 20, 384 << 20: 1 << 30}
