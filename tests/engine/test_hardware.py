"""Names of processors, from what Linux says on x86-64 and on ARM."""

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
