"""The pool of threads, without Python: calls from several threads at once, plain and under the thread sanitizer."""

import shutil
import subprocess
from os import environ
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"


@pytest.fixture(scope="module", params=["plain", "thread"])
def pool_check(request, tmp_path_factory):
    """The program of pool_check.cc, plain and with the thread sanitizer."""
    compiler = shutil.which(environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("NOT TESTED: the pool alone; no C++ compiler (c++ or $CXX)")
    program = tmp_path_factory.mktemp("pool") / "pool_check"
    sanitizer = [] if request.param == "plain" else [f"-fsanitize={request.param}"]
    command = [compiler, "-std=c++20", "-O1", "-g", "-pthread", *sanitizer, f"-I{NATIVE}"]
    command += [HERE / "pool_check.cc", NATIVE / "pool.cc", "-o", program]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0 and sanitizer:
        pytest.skip(f"NOT TESTED: the pool with -fsanitize={request.param}: {made.stderr[-200:]}")
    assert made.returncode == 0, made.stderr
    environment = {name: value for name, value in environ.items() if name != "LD_PRELOAD"}

    def run(*arguments):
        command = [program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)

    return run


@pytest.mark.parametrize(
    ("threads", "callers", "calls"),
    [(1, 1, 20), (1, 4, 50), (2, 1, 200), (2, 3, 100), (4, 2, 500), (4, 6, 50), (16, 2, 10)],
)
def test_calls_share_the_threads(pool_check, threads, callers, calls):
    done = pool_check(threads, callers, calls)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
