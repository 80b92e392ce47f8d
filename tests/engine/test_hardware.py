"""Names of processors and sizes of caches, from what Linux says."""

from pathlib import Path

import pytest

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


def test_caches_are_those_that_the_system_lists(tmp_path):
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    listed = [("1", "Instruction", "64K"), ("1", "Data", "32K"), ("2", "Unified", "512K"), ("3", "Unified", "8192K")]
    for index, values in enumerate((*listed, ("4", "Unified", "odd"))):
        (folder / f"index{index}").mkdir(parents=True)
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / f"index{index}" / name).write_text(f"{value}\n")
    found = [hardware.cache_bytes(level, tmp_path) for level in (1, 2, 3, 4, 5)]
    assert found == [32 << 10, 512 << 10, 8 << 20, None, None]
    assert hardware.cache_bytes(2, tmp_path / "hidden") is None
