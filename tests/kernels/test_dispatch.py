"""Which path runs: what was built, what the CPU has, what `isa` asks for, and what keeps the paths apart."""

import os
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from pruneofa import _native
from tests.kernels.cases import ARM, TABLE, X86, Layer, int8_layer, model

NATIVE = Path(__file__).parents[2] / "native"
CPUINFO = Path("/proc/cpuinfo")
# What a path's functions may use, in the names of /proc/cpuinfo.
AVX512VNNI = {"avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"}
NEEDS = {
    "scalar": set(),
    "avx2": {"avx2", "fma"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx512vnni": AVX512VNNI,
    "avx512bf16": AVX512VNNI | {"avx512_bf16"},
    "neon": {"asimddp"},
    "neon_i8mm": {"asimddp", "i8mm"},
    "amx": AVX512VNNI
    | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "avx512vbmi", "avx512_vbmi2", "avx512_fp16", "popcnt"},
}


def test_paths_are_listed_worst_first():
    available = _native.available_isas()
    assert available[0] == "scalar"
    assert [name for name in TABLE if name in available] == available


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"), reason="the other paths are for x86-64 and ARM"
)
def test_every_path_is_built():
    """A compiler that cannot build one would leave users with a slower one, and nothing else would show it."""
    assert _native.built_isas() == list(TABLE)


def test_a_path_is_available_where_the_operating_system_lists_its_instructions():
    """An independent opinion: the kernel shows flags that the CPU has and whose registers it saves."""
    if not CPUINFO.is_file() or not (
        flags := re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    ):
        pytest.skip("no /proc/cpuinfo with flags on this machine")
    if os.environ.get("PRUNEOFA_EMULATE"):
        pytest.skip("this build runs every path on emulated instructions")
    flags = set(flags[1].split())
    assert _native.available_isas() == [name for name in TABLE if NEEDS[name] <= flags]


@pytest.mark.parametrize("name", ["sve", "AMX", "amx ", "sse2"])
def test_a_path_that_is_not_there_is_refused_with_those_that_are(name):
    listed = ", ".join(_native.available_isas())
    with pytest.raises(ValueError, match=f"isa is '{name}', but this CPU and build have: {listed}$"):
        int8_layer(np.random.default_rng(0), 3, 4, 0.5).build(_native, name)
    with pytest.raises(ValueError, match=f"isa is '{name}', but this CPU and build have: {listed}$"):
        model(depth=1).build(_With(_native, "scalar"), name)


class _With:
    """Linears of one path for an encoder of another."""

    def __init__(self, native, isa):
        self.Encoder = native.Encoder
        self.Linear = lambda *parts: native.Linear(*parts[:-1], isa)


def test_the_layers_of_an_encoder_are_of_its_path(isa):
    others = [name for name in _native.available_isas() if name != isa]
    if not others:
        pytest.skip("this machine has one path only")
    with pytest.raises(ValueError, match="do not fit each other"):
        model(depth=1).build(_With(_native, others[0]), isa)


def test_each_path_says_which_layouts_it_takes(isa):
    layer = int8_layer(np.random.default_rng(0), 64, 128, 0.0)
    assert layer.build(_native, isa).choice.startswith("dense")
    empty = Layer(np.zeros_like(layer.weight), np.zeros_like(layer.kept), layer.scale, layer.bias)
    assert empty.build(_native, isa).choice.startswith("sparse")


# What skipping has to find, by path, for the cheapest of the sparse layouts; AMX has one for all.
@pytest.mark.parametrize(
    ("fill", "sparsity", "layouts"),
    [
        ("4x1", 0.8, dict.fromkeys((*X86[1:5], *ARM[1:]), "sparse blocks of 4 outputs")),
        ("1x4", 0.8, dict.fromkeys((*X86[:5], *ARM[1:]), "consecutive inputs")),
        (
            "random",
            0.9,
            {
                "scalar": "4 consecutive inputs",
                "avx2": "2 gathered inputs",
                **dict.fromkeys(("avxvnni", "avx512vnni", "avx512bf16", "neon", "neon_i8mm"), "4 gathered inputs"),
            },
        ),
        ("random", 0.1, dict.fromkeys(TABLE, "dense")),
    ],
)
def test_the_layout_follows_the_weights(isa, fill, sparsity, layouts):
    choice = int8_layer(np.random.default_rng(0), 64, 768, sparsity, fill).build(_native, isa).choice
    assert layouts.get(isa, "sparse") in choice
    assert choice.startswith("dense" if sparsity == 0.1 else "sparse")


def test_no_instruction_leaks_out_of_its_path():
    """Intrinsics and target attributes are in the files of a CPU family only, and no flag of the build names a CPU."""
    for file in NATIVE.rglob("*.*"):
        text = file.read_text()
        if file.parent.name in ("", "native", "portable") and file.name != "target.h":
            assert not re.search(r"(imm|x86)intrin|arm_neon|_mm\d*_|\bv\w+q_[su]|PRUNEOFA_TARGET|target\(", text), (
                file.name
            )
        if "PRUNEOFA_TARGET_BEGIN(" in text and file.suffix == ".cc":
            # Nothing of the standard library between the two: its inline functions would become the path's.
            inside = text.split("PRUNEOFA_TARGET_BEGIN(")[1].split("PRUNEOFA_TARGET_END")[0]
            assert re.findall(r"#include (\S+)", inside)
            assert all(name.endswith('.inc.h"') for name in re.findall(r"#include (\S+)", inside)), file.name
        if file.name.endswith(".inc.h"):
            assert "#include <" not in text, file.name
    assert not re.search(r"-m(arch|tune|avx|amx|fma)", (NATIVE.parent / "CMakeLists.txt").read_text())
