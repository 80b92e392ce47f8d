"""What the pattern lock and gradual pruning add to a training step.

Claim: a step (forward, backward, clipping, AdamW) with PatternLock, or with GradualPruner whose masks are
selected every 100 steps, takes at most 1.03 times the same step without, at 32 x 128 tokens. Both run in
one process, alternating in short turns, so that a change of the machine's speed hits both alike; the
selection is timed apart and a hundredth of it is added. python benchmarks/step_overhead.py [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import MINILM, machine
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.prune import GradualPruner

SHAPES = {"minilm": MINILM, "bert-base": {}}
LIMIT, INTERVAL, SPARSITY = 1.03, 100, 0.9


def build(shape: dict[str, Any]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A classifier of this shape, sparse, in training mode without dropout, and a batch of 32 x 128 tokens."""
    torch.manual_seed(0)
    config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForSequenceClassification(config).train()
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.masked_fill_(~magnitude_mask(weight, SPARSITY), 0.0)
    batch = {"input_ids": torch.randint(5, 30000, (32, 128)), "labels": torch.randint(0, 2, (32,))}
    return model, batch


def guarded(model: nn.Module, guard: str) -> tuple[Callable[[], object], Callable[[], None], float]:
    """The callback after the optimizer's step, the one that ends the guard, and the seconds of its mask selection."""
    if guard == "lock":
        lock = PatternLock.capture(model)
        return lock.apply, lock.release, 0.0
    pruner = GradualPruner(
        model, final=SPARSITY, initial=SPARSITY, begin=0, end=INTERVAL, stop=10**6, interval=INTERVAL
    )
    start = time.perf_counter()
    pruner.step(0)
    seconds = time.perf_counter() - start
    return lambda: pruner.step(1), pruner.release, seconds  # step 1 is not due: it sets zeros


def step(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer, after: Callable[[], object]) -> float:
    """Seconds of one training step: forward, backward, clipping, AdamW and what the guard does."""
    start = time.perf_counter()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    after()
    return time.perf_counter() - start


def check(shape: dict[str, int]) -> None:
    """Three steps with the lock and with the pruner revive nothing; without them they do."""
    small = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 12}
    for guard in ("none", "lock", "prune"):
        model, batch = build(shape | small)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        after = nothing if guard == "none" else guarded(model, guard)[0]
        pruned = {name: weight.detach() == 0 for name, weight in prunable(model).items()}
        for _ in range(3):
            step(model, batch, optimizer, after)
        revived = sum(int((w[pruned[name]] != 0).sum()) for name, w in prunable(model).items())
        if bool(revived) != (guard == "none"):
            raise SystemExit(f"check failed: {revived} weights revived with guard {guard}")


def nothing() -> None:
    """Do nothing: the callback after the optimizer's step when there is no guard."""


def measure(shape: dict[str, int], turns: int) -> dict:
    """Ratios of alternating steps of one model, and seconds per mask selection, cold step after it included."""
    model, batch = build(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step(model, batch, optimizer, nothing)  # warm up, and create the optimizer's state
    seconds: dict[str, list[float]] = {"none": [], "lock": [], "prune": []}
    selections = []
    order = list(seconds)
    for turn in range(turns):
        for guard in order[turn % 3 :] + order[: turn % 3]:
            after, end, selection = (nothing, nothing, 0.0) if guard == "none" else guarded(model, guard)
            # A selection leaves the caches and the allocator's memory cold: the step after it belongs to its cost.
            first = step(model, batch, optimizer, after)
            seconds[guard].append(step(model, batch, optimizer, after))
            end()
            selections += [selection + first - seconds[guard][-1]] if guard == "prune" else []
    median = {key: statistics.median(values) for key, values in seconds.items()}
    # The ratio of neighbours in time, then its median: what the rest of the machine does mostly cancels.
    ratios = {
        key: statistics.median(x / y for x, y in zip(seconds[key], seconds["none"], strict=True))
        for key in ("lock", "prune")
    }
    ratios["prune"] += statistics.median(selections) / INTERVAL / median["none"]
    return {"median_seconds": median, "selection_seconds": selections, "ratios": ratios, "seconds": seconds}


def main() -> None:
    """Print the ratios; exit code 1 when one is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=None, help="timed steps of each kind (default: 15 and 4)")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record: dict = {"machine": machine()}
    print(json.dumps(record, indent=2))
    over = []
    for name in args.shape or SHAPES:
        check(SHAPES[name])
        record[name] = result = measure(SHAPES[name], args.turns or (15 if name == "minilm" else 4))
        step, selection = result["median_seconds"]["none"], statistics.median(result["selection_seconds"])
        print(f"{name}: a step takes {step:.3f} s without, a selection of all masks {selection:.3f} s")
        for key, ratio in result["ratios"].items():
            print(f"  {key:6} {ratio:.4f} times the step without (limit {LIMIT})")
            over += [f"{name} {key}"] if ratio > LIMIT else []
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if over:
        raise SystemExit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
