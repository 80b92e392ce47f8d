"""Select masks for all 302 million encoder weights of BERT-Large: seconds and extra memory.

Claim: uniform and global each take at most 3 s on 2 cores and one layer's worth of memory (16 MiB) beyond
the weights and the masks themselves. Correctness comes first: exact counts, and nothing kept is smaller
than anything pruned. Run it while nothing else runs: python benchmarks/mask_selection.py [--json FILE]
"""

import argparse
import ctypes
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from machine import machine
from torch import Tensor

from pruneofa.train.masks import global_masks, magnitude_mask

SHAPES = {"query": (1024, 1024), "key": (1024, 1024), "value": (1024, 1024), "attention": (1024, 1024)} | {
    "intermediate": (4096, 1024), "output": (1024, 4096)
}  # fmt: skip
LIMIT_SECONDS, LIMIT_MIB = 3.0, 16.0


def anonymous_mib() -> float:
    """Anonymous resident memory of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """A list whose only item becomes the growth of RssAnon at its highest, sampled every half millisecond."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed leaves RssAnon, so that it shows what is in use
    libc.malloc_trim(0)  # and free memory that the allocator still holds does not hide the growth
    done, start = threading.Event(), anonymous_mib()
    growth = [0.0]

    def sample() -> None:
        while not done.wait(0.0005):
            growth[0] = max(growth[0], anonymous_mib() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield growth
    finally:
        done.set()
        thread.join()
        growth[0] = max(growth[0], anonymous_mib() - start)


def uniform(weights: dict[str, Tensor], masks: dict[str, Tensor], sparsity: float) -> None:
    """Every layer at the same sparsity."""
    for name, weight in weights.items():
        masks[name].copy_(magnitude_mask(weight, sparsity))


def one_threshold(weights: dict[str, Tensor], masks: dict[str, Tensor], sparsity: float) -> None:
    """One threshold for all layers."""
    for name, mask in global_masks(weights, sparsity):
        masks[name].copy_(mask)


def check(weights: dict[str, Tensor], masks: dict[str, Tensor], sparsity: float, layers: list[list[str]]) -> None:
    """In each group of layers: the exact count is pruned, and no kept weight is below a pruned one."""
    for group in layers:
        total = sum(weights[name].numel() for name in group)
        pruned = sum(int((~masks[name]).sum()) for name in group)
        largest_pruned = max(float(weights[n].masked_fill(masks[n], 0).abs().max()) for n in group)
        smallest_kept = min(float(weights[n].masked_fill(~masks[n], 1e9).abs().min()) for n in group)
        if pruned != int(sparsity * total) or largest_pruned > smallest_kept:
            raise SystemExit(f"wrong masks: {pruned} of {total}, {largest_pruned} pruned, {smallest_kept} kept")


def measure(
    select: Callable[..., None], weights: dict[str, Tensor], masks: dict[str, Tensor], args: argparse.Namespace
) -> dict:
    """Seconds of each repeat without the memory sampler, then one more run with it."""
    wall, cpu = [], []
    for _ in range(args.repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        select(weights, masks, args.sparsity)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    with peak_memory() as growth:
        select(weights, masks, args.sparsity)
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "median_seconds": statistics.median(wall),
        "median_cpu_seconds": statistics.median(cpu),
        "extra_mib": growth[0],
    }


def main() -> None:
    """Print the numbers; exit code 1 when one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weights = {f"{i}.{n}": torch.randn(s) * 0.04 for i in range(args.layers) for n, s in SHAPES.items()}
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    for mask in masks.values():
        mask.fill_(True)  # touch the pages: the result is not extra memory
    record: dict = {"machine": machine(), "weights": sum(w.numel() for w in weights.values())}
    print(json.dumps(record, indent=2))
    groups = {uniform: [[name] for name in weights], one_threshold: [list(weights)]}
    for select, group in groups.items():
        select(weights, masks, args.sparsity)
        check(weights, masks, args.sparsity, group)
    for key, select in {"uniform": uniform, "global": one_threshold}.items():
        record[key] = measure(select, weights, masks, args)
        median, extra = record[key]["median_seconds"], record[key]["extra_mib"]
        cpu = record[key]["median_cpu_seconds"]
        record[key]["ok"] = median <= LIMIT_SECONDS and extra <= LIMIT_MIB
        print(
            f"{key:8} {median:6.3f} s (limit {LIMIT_SECONDS}; {cpu:.3f} s of CPU)  "
            f"{extra:6.1f} MiB extra (limit {LIMIT_MIB})"
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if not (record["uniform"]["ok"] and record["global"]["ok"]):
        raise SystemExit("over the limit")


if __name__ == "__main__":
    main()
