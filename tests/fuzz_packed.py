"""Fuzz the reader of packed folders, guided by coverage:  python -m tests.fuzz_packed --seconds 600 --work DIR

An input is a whole folder. The seeds are the golden folders; each mutation damages a byte or a field of one of their
files, and most then state sizes, checksum, figures and hashes anew, so that what lies behind those checks is reached.
Whatever comes out, `packed.read` and `Engine` have to accept it or to raise InputError in one line, within SECONDS of
processor time and the memory that the folder's own size justifies. Every other ending is kept in DIR, once per place
in the code, and makes the exit code 1; `python -m tests.fuzz_packed DIR/FILE` repeats one.

Coverage comes from atheris, which is not among the development dependencies: pip install atheris.
`tests/engine/test_packed_fuzz.py` runs some mutations without it.
"""

import argparse
import contextlib
import inspect
import os
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FunctionType

import zstandard

from pruneofa.engine import engine, reference
from pruneofa.engine.engine import Engine
from pruneofa.errors import InputError
from pruneofa.formats.manifest import COMPRESSED, MAX_RATIO, MAX_SLACK, TENSORS
from pruneofa.formats.packed import read
from tests.fuzz_mutations import LARGEST, Files, is_frame, mutate, pack, seeds, unpack

SECONDS = 2.0
BYTES, BYTES_EACH = 4 << 20, 64  # memory in all, and per byte of the folder; a Python object takes 16 to 64
FOLLOWED = ("pruneofa.formats.", "pruneofa.engine.")


class Broken(Exception):
    """A folder was read, or refused, in a way that it must not be."""


def check(files: Files, folder: Path) -> tuple[str, float]:
    """Read the files from `folder`, and run them if they are accepted; how that ended, and seconds of processor time.

    Raises Broken, or whatever the reader raises that is no InputError.
    """
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content:
            (folder / name).write_bytes(content)
    (folder / COMPRESSED).write_bytes(files[TENSORS])  # the manifest says which of the two is read
    begin = time.process_time()
    with _tracing():
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        ending = _read_and_run(folder)
        peak = tracemalloc.get_traced_memory()[1] - before
    if (taken := time.process_time() - begin) > SECONDS:
        raise Broken(f"{taken:.1f} s; allowed {SECONDS}")
    if peak > (allowed := BYTES + BYTES_EACH * _size(files)):
        raise Broken(f"{peak} bytes of memory; allowed {allowed}")
    return ending, taken


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Memory is traced; if it was before, as in a long run, it stays so: each start of tracemalloc leaks a little."""
    already = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not already:
            tracemalloc.stop()


def _size(files: Files) -> int:
    """Bytes of the folder, with those that FORMAT.md lets a frame become."""
    unpacked = 0
    with contextlib.suppress(zstandard.ZstdError):
        unpacked = zstandard.frame_content_size(files[TENSORS]) if is_frame(files[TENSORS]) else 0
    if unpacked > MAX_RATIO * len(files[TENSORS]) + MAX_SLACK:
        unpacked = 0
    return unpacked + sum(map(len, files.values()))


def _read_and_run(folder: Path) -> str:
    try:
        model = read(folder)
    except InputError as error:
        return f"refused by the reader: {_refusal(error, folder)}"
    isas = engine.native.available_isas()
    for precision in sorted({model.precision, "int8"}):
        isa = isas[sum(weight.size for weight in model.plain.values()) % len(isas)]
        try:
            Engine.from_pretrained(folder, precision=precision, threads=1, isa=isa).encode([[0, 0]])
        except InputError as error:
            return f"refused by the engine: {_refusal(error, folder)}"
    return "read and run"


def _refusal(error: InputError, folder: Path) -> str:
    """Where it was raised. Raises Broken unless its message is one short line that can be printed."""
    text = str(error).replace(str(folder), "")
    if len(text) > 700 or not text.isprintable():
        raise Broken(f"a message of {len(text)} characters: {ascii(text)[:200]}") from error
    return _place(error)


def _place(error: BaseException) -> str:
    calls = [call for call in traceback.extract_tb(error.__traceback__) if "pruneofa" in call.filename]
    calls = [call for call in calls if call.name not in ("want", "_want")] or calls  # they refuse for their callers
    return f"{Path(calls[-1].filename).name}:{calls[-1].lineno}" if calls else "nowhere"


# The fuzzer


def say(text: str) -> None:
    """Print at once: the process ends without closing its files."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Fuzzing:
    """Counts how folders end, and keeps those that end as they must not."""

    def __init__(self, work: Path, seconds: float) -> None:
        self.work, self.seconds, self.begin = work, seconds, time.monotonic()
        self.endings: Counter[str] = Counter()
        self.found: dict[str, str] = {}
        self.slowest = 0.0
        self._temporary = tempfile.TemporaryDirectory(prefix="pruneofa-fuzz-")

    def try_(self, data: bytes) -> None:
        """One input; when the time is up, the report, and the end of the process."""
        try:
            ending, taken = check(unpack(data), Path(self._temporary.name))
            self.slowest = max(self.slowest, taken)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            ending = f"{type(error).__name__} {_place(error.__cause__ or error)}"
            if ending not in self.found:
                self.found[ending] = f"{error}"[:300]
                name = "".join(c if c.isalnum() else "-" for c in ending)
                (self.work / name).write_bytes(data)
                say(f"FOUND {ending}: {error}"[:400])
        self.endings[ending] += 1
        if time.monotonic() - self.begin > self.seconds:
            say(self.report())
            self._temporary.cleanup()
            os._exit(1 if self.found else 0)  # libFuzzer has no other way out

    def report(self) -> str:
        """What was done and found."""
        total, kinds = self.endings.total(), Counter()
        for ending, count in self.endings.items():
            kinds[ending.split(": ")[0]] += count
        places = len([ending for ending in self.endings if ending.startswith("refused")])
        lines = [
            f"{total} folders in {time.monotonic() - self.begin:.0f} s",
            *(f"{count:9} {kind}" for kind, count in kinds.most_common()),
            f"refused at {places} places of the code; slowest {self.slowest:.2f} s of processor time",
            f"found: {len(self.found)}",
            *(f"  {ending}: {message}" for ending, message in self.found.items()),
        ]
        return "\n".join(lines)


def instrumented() -> Iterator[FunctionType]:
    """The functions whose branches the fuzzer follows: those that see what a folder says."""
    for module in [sys.modules[name] for name in sorted(sys.modules) if name.startswith(FOLLOWED)]:
        for value in vars(module).values():
            for found in vars(value).values() if isinstance(value, type) else [value]:
                function = inspect.unwrap(found) if callable(found) else None
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    yield function


def main() -> None:
    """Fuzz for a while, or repeat one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("again", nargs="*", type=Path, help="kept inputs to repeat, instead of fuzzing")
    parser.add_argument("--seconds", type=float, default=600, help="how long (default 600)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer (default 1)")
    parser.add_argument("--work", type=Path, default=Path("fuzz"), help="for corpus and findings (default fuzz)")
    options = parser.parse_args()
    if engine.native is None:
        say("the native kernels were not built: the reference runs instead")
        engine.native = reference
    for path in options.again:
        with tempfile.TemporaryDirectory() as folder:
            ending, taken = check(unpack(path.read_bytes()), Path(folder))
            say(f"{path}: {ending}, {taken:.2f} s")
    if options.again:
        return
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed, wanted for coverage; run: pip install atheris")
    corpus = options.work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, files in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(pack(files))
    for function in instrumented():
        atheris.instrument_func(function)

    golden = seeds()

    def custom(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        # Faults gather in the corpus, and most folders with several stop at the first: begin anew now and then.
        files = random.choice(golden) if random.random() < 0.3 else unpack(data)
        mutated = pack(mutate(files, random, lambda part: bytes(atheris.Mutate(part, len(part) + 64))))
        return mutated if len(mutated) <= most else data

    tracemalloc.start()
    fuzzing = Fuzzing(options.work, options.seconds)
    # The timeout is of wall time, which passes while the process is stopped: only for what never ends.
    settings = {"seed": options.seed, "max_len": LARGEST, "rss_limit_mb": 2048, "timeout": 900, "mutate_depth": 1,
                "artifact_prefix": f"{options.work}/", "print_final_stats": 1}  # fmt: skip
    arguments = [sys.argv[0], str(corpus), *(f"-{name}={value}" for name, value in settings.items())]
    atheris.Setup(arguments, fuzzing.try_, custom_mutator=custom, internal_libfuzzer=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
