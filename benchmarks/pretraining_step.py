"""A pre-training step (hard loss + KD) with the fused vocabulary head, beside the same step written naively.

    python benchmarks/pretraining_step.py [--repeats 10] [--json]

MiniLM's shape (6 x 384, vocabulary 30,522) with random weights, 32 x 128 tokens, dropout 0. The naive step takes
full-vocabulary logits of every position from student and teacher, then ordinary cross-entropy and KL. Both
variants alternate in one process, after a check that loss and gradients agree. Peak memory (RssAnon) is measured
with each variant in a process of its own. Exit code 1 if a target is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import children
import torch
import torch.nn.functional as F
from machine import MINILM
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from pruneofa.train.distill import fused_head_losses
from pruneofa.train.heads import vocabulary_head
from pruneofa.train.objective import PretrainingObjective

ITEMS, LENGTH, TEMPERATURE = 32, 128, 2.0
TARGETS = {"head": 1.5, "step": 1.25, "memory": 0.5}  # two speed-ups at least, one ratio at most
TOLERANCE = 1e-4
VARIANTS = ("naive", "fused")
Batch = dict[str, Tensor]


def build() -> tuple[BertForPreTraining, BertForPreTraining]:
    """Student and teacher of MiniLM's shape with different random weights; no dropout, so that losses compare."""
    config = BertConfig(**MINILM, vocab_size=30522, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    return BertForPreTraining(config), BertForPreTraining(config).eval().requires_grad_(False)


def random_batch() -> Batch:
    """32 x 128 random tokens without padding, 15 % of them masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (ITEMS, LENGTH), generator=generator)
    masked = torch.rand(ITEMS, LENGTH, generator=generator) < 0.15
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": ids.masked_fill(~masked, -100),
        "next_sentence_label": torch.randint(2, (ITEMS,), generator=generator),
    }


def naive_kd(student: Tensor, teacher: Tensor) -> Tensor:
    """T²·KL, mean over positions."""
    student, teacher = student.flatten(0, -2).float() / TEMPERATURE, teacher.flatten(0, -2).float() / TEMPERATURE
    divergence = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")
    return TEMPERATURE**2 * divergence


def naive_step(student: BertForPreTraining, teacher: BertForPreTraining, batch: Batch) -> Tensor:
    """Loss of a step the way it is usually written."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    output = student(**inputs)
    with torch.no_grad():
        target = teacher(**inputs)
    mlm = F.cross_entropy(output.prediction_logits.flatten(0, 1).float(), batch["labels"].flatten())
    nsp = F.cross_entropy(output.seq_relationship_logits.float(), batch["next_sentence_label"])
    kd = naive_kd(output.prediction_logits, target.prediction_logits)
    return 0.5 * (mlm + nsp + kd + naive_kd(output.seq_relationship_logits, target.seq_relationship_logits))


def steps(student: BertForPreTraining, teacher: BertForPreTraining, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """The loss of a whole step, by variant."""
    objective = PretrainingObjective(
        student, teacher, hard=0.5, kd=0.5, hidden=0.0, temperature=TEMPERATURE, positions="all", nsp=True
    ).train()
    return {
        "naive": lambda: naive_step(student, teacher, batch),
        "fused": lambda: objective(batch, objective.counts(batch))["loss"],
    }


def heads(
    student: BertForPreTraining, teacher: BertForPreTraining, batch: Batch
) -> tuple[Tensor, dict[str, Callable[[], Tensor]]]:
    """The encoder's output as a leaf, and MLM head + losses on top of it, by variant."""
    hidden = torch.randn(ITEMS * LENGTH, 384, generator=torch.Generator().manual_seed(2)).requires_grad_()
    target = torch.randn(ITEMS * LENGTH, 384, generator=torch.Generator().manual_seed(3))
    labels = batch["labels"].flatten()

    def naive() -> Tensor:
        logits = student.cls.predictions(hidden)
        with torch.no_grad():
            teacher_logits = teacher.cls.predictions(target)
        return 0.5 * (F.cross_entropy(logits.float(), labels) + naive_kd(logits, teacher_logits))

    def fused() -> Tensor:
        masked = labels != -100
        rows = torch.cat([masked.nonzero().squeeze(-1), (~masked).nonzero().squeeze(-1)])
        transform, decoder = vocabulary_head(student)
        teacher_transform, teacher_decoder = vocabulary_head(teacher)
        with torch.no_grad():
            teacher_hidden = teacher_transform(target[rows])
        return fused_head_losses(
            transform(hidden[rows]),
            decoder.weight,
            decoder.bias,
            labels=labels[masked],
            hard_scale=0.5 / masked.sum(),
            teacher=(teacher_hidden, teacher_decoder.weight, teacher_decoder.bias),
            temperature=TEMPERATURE,
            kd_scale=0.5 / len(rows),
        ).loss

    return hidden, {"naive": naive, "fused": fused}


def run(loss: Callable[[], Tensor], precision: str, update: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of forward, backward and `update`."""
    start, start_cpu = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = loss()
    value.backward()
    update()
    return time.perf_counter() - start, time.process_time() - start_cpu


def check(losses: dict[str, Callable[[], Tensor]], parameters: list[Tensor]) -> float:
    """Largest relative difference of loss and gradients in fp32. Raises SystemExit above the tolerance."""
    values, gradients = {}, {}
    for variant, loss in losses.items():
        value = loss()
        gradients[variant] = torch.autograd.grad(value, parameters)
        values[variant] = value.item()
    difference = abs(values["fused"] / values["naive"] - 1)
    for fused, naive in zip(gradients["fused"], gradients["naive"], strict=True):
        error = (fused - naive).norm().item()
        # A key's bias adds the same to every score, so its true gradient is 0 and only rounding is left.
        difference = max(difference, error / max(naive.norm().item(), 1e-4))
    if not difference <= TOLERANCE:
        sys.exit(f"the variants differ by {difference:.1e} relative, allowed {TOLERANCE:.0e}: {values}")
    return difference


def compare(
    losses: dict[str, Callable[[], Tensor]], precision: str, update: Callable[[], None], repeats: int
) -> dict[str, float]:
    """Median seconds of each variant, alternating, and their ratio with p10 and p90 over the pairs.

    The ratio of CPU seconds is given too: on a machine shared with others it is the steadier one.
    """
    taken: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for repeat in range(repeats + 1):
        for variant in VARIANTS:
            seconds = run(losses[variant], precision, update)
            if repeat:  # the first pair warms up
                taken[variant].append(seconds)
    wall, cpu = ({v: [pair[clock] for pair in taken[v]] for v in VARIANTS} for clock in (0, 1))
    ratios = sorted(a / b for a, b in zip(wall["naive"], wall["fused"], strict=True))
    medians = {variant: statistics.median(wall[variant]) for variant in VARIANTS}
    return {
        **{f"{variant}_s": seconds for variant, seconds in medians.items()},
        "speedup": medians["naive"] / medians["fused"],
        "p10": ratios[len(ratios) // 10],
        "p90": ratios[-1 - len(ratios) // 10],
        "cpu_speedup": statistics.median(cpu["naive"]) / statistics.median(cpu["fused"]),
    }


def time_head(precision: str, repeats: int) -> dict[str, float]:
    """Head + losses, forward and backward."""
    student, teacher = build()
    hidden, losses = heads(student, teacher, random_batch())
    learning = [hidden, *student.cls.predictions.parameters()]
    difference = check(losses, learning)

    def update() -> None:
        for parameter in learning:
            parameter.grad = None

    return {**compare(losses, precision, update, repeats), "fp32_difference": difference}


def whole_step() -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Callable[[], None]]:
    """Losses by variant, the parameters that learn, and clipping + AdamW."""
    student, teacher = build()
    losses = steps(student.train(), teacher, random_batch())
    learning: list[Tensor] = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return losses, learning, update


def time_step(precision: str, repeats: int) -> dict[str, float]:
    """The whole step: both encoders, heads, losses, backward, clipping, AdamW."""
    losses, learning, update = whole_step()
    difference = check(losses, learning)
    return {**compare(losses, precision, update, repeats), "fp32_difference": difference}


def measure(name: str, precision: str, repeats: int) -> dict[str, float]:
    """Time "head" or "step"."""
    return time_head(precision, repeats) if name == "head" else time_step(precision, repeats)


def anonymous_memory() -> int:
    """RssAnon of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon; this benchmark needs Linux")


def print_peak_memory(variant: str, precision: str) -> None:
    """Three whole steps of one variant while a thread samples RssAnon; prints the peak in bytes."""
    losses, _, update = whole_step()
    peak, done = anonymous_memory(), threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    for _ in range(3):
        run(losses[variant], precision, update)
    done.set()
    thread.join()
    print(peak)


def peak_memory(precision: str) -> dict[str, float]:
    """Peak RssAnon in MB of each variant, in processes of their own, and fused / naive."""
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--peak-of", variant, "--precisions", precision]
        peaks[variant] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e6
    return {**{f"{variant}_mb": peak for variant, peak in peaks.items()}, "ratio": peaks["fused"] / peaks["naive"]}


def report(precision: str, name: str, row: dict[str, float]) -> None:
    """Print one measurement."""
    if name == "memory":
        line = f"naive {row['naive_mb']:.0f} MB, fused {row['fused_mb']:.0f} MB, ratio {row['ratio']:.2f}"
    else:
        line = (
            f"naive {row['naive_s']:.2f} s, fused {row['fused_s']:.2f} s, {row['speedup']:.2f}x "
            f"(p10 {row['p10']:.2f}, p90 {row['p90']:.2f}; CPU seconds {row['cpu_speedup']:.2f}x); "
            f"fp32 difference {row['fp32_difference']:.0e}"
        )
    wanted = f"at most {TARGETS[name]}" if name == "memory" else f"at least {TARGETS[name]}x"
    print(f"{precision} {name}: {line}; wanted {wanted}: {'met' if met(name, row) else 'MISSED'}", flush=True)


def met(name: str, row: dict[str, float]) -> bool:
    """Whether a measurement reaches its target."""
    return row["ratio"] <= TARGETS[name] if name == "memory" else row["speedup"] >= TARGETS[name]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="timed pairs (default 10)")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak_memory(options.peak_of, options.precisions[0])
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for precision in options.precisions:
        results[precision] = {}
        for name in TARGETS:
            row = peak_memory(precision) if name == "memory" else measure(name, precision, options.repeats)
            results[precision][name] = row
            if not options.json:
                report(precision, name, row)
    if options.json:
        print(json.dumps({"tokens": ITEMS * LENGTH, "threads": torch.get_num_threads(), "results": results}, indent=2))
    if not all(met(name, row) for rows in results.values() for name, row in rows.items()):
        sys.exit(1)


if __name__ == "__main__":
    children.run(main)
