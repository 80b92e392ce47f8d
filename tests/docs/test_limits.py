"""The sparsities of docs/why-not-faster.md are those at which the kernels change their layout."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = {
    "AMX": "x86/amx.cc",
    "AVX-512 VNNI": "x86/avx512_vnni.inc.h",
    "AVX-VNNI": "x86/avxvnni.cc",
    "AVX2": "x86/avx2.cc",
    "ARM with i8mm": "arm/neon_i8mm.cc",
    "ARM with dotprod": "arm/neon.cc",
    "any other": "portable/scalar.cc",
}


def test_limits_of_every_path():
    page = (ROOT / "docs" / "why-not-faster.md").read_text(encoding="utf-8")
    stated = re.findall(r"^   \| ([^|(]+?) (?:\([^)]*\) )?\| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {name for name, *_ in stated} == set(PATHS)
    for name, *limits in stated:
        source = (ROOT / "native" / PATHS[name]).read_text(encoding="utf-8")
        found = re.search(r"\.sparse_above = ([\d.]+)f,\s+\.sparse_above_float = ([\d.]+)f,", source)
        assert found is not None and [float(limit) for limit in found.groups()] == list(map(float, limits)), name
