"""A bf16 training step on the CPU with `bf16_attention`, beside the same step with PyTorch's own attention.

    python benchmarks/attention.py [--repeats 10] [--threads N] [--json]

MiniLM's shape (6 x 384, 12 heads) with random weights: forward, backward of the mean square of the output, at the
lengths of the recipes, with and without dropout. The variants alternate in one process after a check that their
outputs agree. Exit code 1 if `bf16_attention` is slower in any case.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from machine import MINILM
from transformers import BertConfig, BertModel

from pruneofa.train.attention import NAME, use_bf16_attention

SHAPES = ((32, 24), (16, 128), (12, 256))
TOLERANCE = 0.05


def build(dropout: float) -> BertModel:
    """An encoder of MiniLM's shape."""
    config = BertConfig(**MINILM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=dropout)
    torch.manual_seed(0)
    return BertModel(config).train()


def run(model: BertModel, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds of a step without the optimizer, and the output."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids).last_hidden_state
    output.float().square().mean().backward()
    return time.perf_counter() - start, output.detach()


def measure(items: int, length: int, dropout: float, repeats: int) -> dict[str, float]:
    """Median seconds of either variant and their ratio."""
    ids = torch.randint(1000, 30000, (items, length), generator=torch.Generator().manual_seed(1))
    sdpa, written_out = build(dropout), build(dropout)
    use_bf16_attention(written_out)
    outputs = [run(model.eval(), ids)[1].float() for model in (sdpa, written_out)]
    difference = float((outputs[0] - outputs[1]).norm() / outputs[0].norm())
    if not difference < TOLERANCE:
        sys.exit(f"the outputs differ by {difference:.2g} relative, allowed {TOLERANCE}")
    seconds: dict[str, list[float]] = {"sdpa": [], NAME: []}
    for repeat in range(repeats + 1):
        for name, model in (("sdpa", sdpa.train()), (NAME, written_out.train())):
            taken, _ = run(model, ids)
            if repeat:  # the first pair warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "speedup": medians["sdpa"] / medians[NAME], "difference": difference}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="timed pairs (default 10)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for items, length in SHAPES:
        for dropout in (0.0, 0.1):
            row = measure(items, length, dropout, options.repeats)
            rows.append({"items": items, "length": length, "dropout": dropout, **row})
            if not options.json:
                print(
                    f"{items} x {length}, dropout {dropout}: sdpa {row['sdpa']:.3f} s, {NAME} {row[NAME]:.3f} s, "
                    f"{row['speedup']:.2f}x",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2))
    if min(row["speedup"] for row in rows) < 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
