"""No kernel touches memory that is not its own: every input and buffer ends at a page without access."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def guarded(tmp_path_factory):
    """Runs tests.kernels.guarded with the allocator in front of the one of the C++ library."""
    if sys.platform != "linux":
        pytest.skip("NOT TESTED: guard pages; replacing the allocator by LD_PRELOAD is done on Linux only")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer brings its own allocator, which watches the ends of blocks")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("NOT TESTED: guard pages; no C++ compiler (c++ or $CXX) to build the allocator")
    library = tmp_path_factory.mktemp("guard") / "guard_allocator.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", HERE / "guard_allocator.cc", "-o", library]
    subprocess.run(command, check=True)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "tests.kernels.guarded", *arguments],
            cwd=HERE.parents[1],
            env=os.environ | {"LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("kind", ["input", "buffer", "freed"])
def test_the_guard_bites(guarded, kind):
    done = guarded("read", kind)
    assert done.stdout == "inside\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("what", ["linears", "patterns", "encoders", "biased"])
def test_kernels_stay_within_their_buffers(guarded, isa, what):
    done = guarded(what, isa)
    assert done.returncode == 0, f"exit {done.returncode} (-11: touched memory past a buffer)\n{done.stderr[-3000:]}"
