"""What quantization-aware training adds to a step of transfer.

Claim: an optimizer step of the quantize stage (forward of student and teacher, KD, backward, clipping, AdamW,
pattern lock) takes at most 1.35 times the same step of the transfer stage, in bf16 and in fp32. Both run in one
process on the same batch, alternating in turns, so that a change of the machine's speed hits both alike.
MiniLM's shape, 90 % sparse, 32 x 128 tokens, dropout 0. python benchmarks/qat_step.py [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import MINILM, machine
from transformers import BertConfig, BertForSequenceClassification

from pruneofa.train.attention import use_bf16_attention
from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import magnitude_mask, prunable
from pruneofa.train.objective import TransferObjective
from pruneofa.train.quantize import FakeQuantizer

LIMIT, SPARSITY, ROWS = 1.35, 0.9, 32
NEAR = 1e-3  # how far the first loss of a quantized step may be from that of an ordinary one, of the loss
KINDS = ("transfer", "static", "frozen", "dynamic", "tensor")
SETTINGS: dict[str, dict] = {
    "static": {},
    "frozen": {},
    "dynamic": {"activations": "dynamic"},
    "tensor": {"weights": "tensor", "embeddings": False},
}


class Step:
    """One student with its teacher, optimizer and lock; quantized or not."""

    def __init__(self, kind: str, precision: str, shape: dict[str, Any], length: int) -> None:
        torch.manual_seed(0)
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        student, teacher = BertForSequenceClassification(config).train(), BertForSequenceClassification(config)
        with torch.no_grad():
            for weight in prunable(student).values():
                weight.masked_fill_(~magnitude_mask(weight, SPARSITY), 0.0)
        self.kind, self.bf16 = kind, precision == "bf16"
        if self.bf16:
            use_bf16_attention(student)
            use_bf16_attention(teacher)
            for module in teacher.base_model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(torch.bfloat16)
        self.objective = TransferObjective(
            student, teacher, kind="classification", hard=0.0, kd=1.0, hidden=1.0, temperature=2.0
        )
        self.lock = PatternLock.capture(student)
        self.quantizer = FakeQuantizer(student, **SETTINGS[kind]) if kind in SETTINGS else None
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
        self.batch = {"input_ids": torch.randint(5, 30000, (ROWS, length))}
        self.batch["attention_mask"] = torch.ones_like(self.batch["input_ids"])
        self.steps = 0
        self.loss = torch.tensor(float("nan"))  # of the last step

    def __call__(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        if self.quantizer is not None and self.steps and self.kind == "frozen":
            self.quantizer.observing = False
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self.batch, self.objective.counts(self.batch))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.lock.apply()
        self.steps += 1
        self.loss = loss.detach()
        return time.perf_counter() - start


def check(precision: str) -> None:
    """Quantized and ordinary steps start from nearly the same loss, and neither revives a weight; SystemExit if not."""
    losses = {}
    small = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 12}
    for kind in KINDS:
        step = Step(kind, precision, small, 16)
        step()
        losses[kind] = float(step.loss)
        step(), step()
        step.lock.verify()
    if far := far_from_the_first(losses):
        raise SystemExit(f"{precision}: the first losses of {', '.join(far)} are not that of transfer: {losses}")


def far_from_the_first(losses: dict[str, float]) -> list[str]:
    """The kinds whose loss differs from that of the first kind by more than NEAR of it, or is NaN."""
    first = next(iter(losses.values()))
    return [kind for kind, loss in losses.items() if not abs(loss - first) <= NEAR * abs(first)]


def measure(precision: str, turns: int, kinds: list[str], length: int) -> dict:
    """Median seconds of each kind of step, and the median ratio of neighbours in time."""
    steps = {kind: Step(kind, precision, MINILM, length) for kind in kinds}
    for step in steps.values():
        step(), step()  # warm up, and create the optimizer's state
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns):
        order = kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]
        for kind in order:
            seconds[kind].append(steps[kind]())
    ratios = {
        kind: statistics.median(x / y for x, y in zip(seconds[kind], seconds["transfer"], strict=True))
        for kind in kinds[1:]
    }
    return {"median_seconds": {k: statistics.median(v) for k, v in seconds.items()}, "ratios": ratios,
            "seconds": seconds}  # fmt: skip


def main() -> None:
    """Print the ratios; exit code 1 when one is over the limit, or a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="timed steps of each kind")
    parser.add_argument("--precision", choices=["bf16", "fp32"], action="append", help="default: both")
    parser.add_argument("--kind", choices=KINDS[1:], action="append", help="default: all")
    parser.add_argument("--length", type=int, default=128, help="tokens of each of the 32 rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record: dict = {"machine": machine()}
    print(json.dumps(record, indent=2))
    over = []
    for precision in args.precision or ["bf16", "fp32"]:
        check(precision)
        record[precision] = result = measure(
            precision, args.turns, ["transfer", *(args.kind or KINDS[1:])], args.length
        )
        print(f"{precision}: a step of transfer takes {result['median_seconds']['transfer']:.3f} s")
        for kind, ratio in result["ratios"].items():
            print(f"  {kind:8} {ratio:.3f} times that (limit {LIMIT})")
            over += [f"{precision} {kind}"] if ratio > LIMIT else []
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if over:
        raise SystemExit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
