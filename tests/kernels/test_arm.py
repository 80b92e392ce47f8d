"""The paths for ARM: cross-compiled, and run on emulated CPUs by a program without Python (paths_check.cc)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
CHECKED = ["sums 240", "int8 outputs 60", "fp32 outputs 60", "panels 60", "attention 40", "patterns 40", "encoders 12"]

pytestmark = pytest.mark.slow  # a minute of compiling


@pytest.fixture(scope="module")
def paths_check(tmp_path_factory):
    """Runs the program on a CPU that qemu knows by that name."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    missing = [name for name in ("cmake", COMPILER) if shutil.which(name) is None]
    missing += [] if emulator else [EMULATORS[0]]
    if missing:
        pytest.skip(f"NOT TESTED: kernels for ARM; this machine has no {' and no '.join(missing)}")
    folder = tmp_path_factory.mktemp("arm")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DPRUNEOFA_CHECK=ON", "-DPRUNEOFA_WERROR=ON"]
    configure += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    configure += ["-DCMAKE_EXE_LINKER_FLAGS=-static"]
    for command in (configure, ["cmake", "--build", folder]):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]

    def run(cpu, *arguments):
        command = [emulator, "-cpu", cpu, folder / "paths_check", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)

    return run


@pytest.mark.parametrize(
    ("cpu", "paths"),
    [
        ("cortex-a57", ["scalar"]),  # ARMv8.0
        ("neoverse-n1", ["scalar", "neon"]),  # dotprod
        ("max", ["scalar", "neon", "neon_i8mm"]),
    ],
)
def test_the_cpu_decides_which_paths_there_are(paths_check, cpu, paths):
    assert paths_check(cpu, "list").stdout.split() == paths


@pytest.mark.parametrize(
    ("cpu", "isa"), [("cortex-a57", "scalar"), ("neoverse-n1", "neon"), ("max", "neon"), ("max", "neon_i8mm")]
)
def test_a_path_computes_what_the_portable_one_does(paths_check, cpu, isa):
    done = paths_check(cpu, "check", isa, "1")
    assert (done.returncode, done.stdout.splitlines()) == (0, CHECKED), done.stderr
