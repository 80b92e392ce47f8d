"""Memory, tokens and arithmetic of each pruning score, from formulas: python benchmarks/score_cost.py

Claim: the memory that a score needs is known before it starts. `memory_needed` of train/curvature.py and
train/layerwise.py are the formulas by which pruneofa refuses what does not fit. The minutes follow from the arithmetic
and the two rates given: --rate of float32, and --rate64 of the float64 factorizations of score obs.
"""

import argparse
import json

from pruneofa.train import curvature, layerwise
from pruneofa.train.scores import block_size

# layers, hidden, inner
MODELS = {"MiniLM": (6, 384, 1536), "BERT-Base": (12, 768, 3072), "BERT-Large": (24, 1024, 4096)}
VOCABULARY = 30_522 + 512 + 2  # rows of the embeddings of BERT
ROUNDS = 8  # run/one_shot.py


def rows(options: argparse.Namespace) -> list[dict]:
    """One row per model and score, for pruning once."""
    found = []
    for name, (layers, hidden, inner) in MODELS.items():
        weights = layers * (4 * hidden * hidden + 2 * hidden * inner) + hidden * hidden  # and the pooler
        calibration = options.calibration * options.length
        gradients = options.gradients * curvature.EXAMPLES * options.length
        size = block_size(options.block, "unstructured")
        forward = 2 * weights + 4 * layers * options.length * hidden  # per token; attention is in the second term
        moments = layers * (4 * hidden**2 + 2 * hidden * inner + 5 * hidden**2 + inner**2)
        solve = layerwise.ROUNDS + layerwise.FITS
        fits = sum(
            count * (2 * solve * out * width**2 + layerwise.ROUNDS // layerwise.SAME_PENALTY * 2 * width**3)
            for count, out, width in ((4, hidden, hidden), (1, inner, hidden), (1, hidden, inner))
        )
        costs = {
            "magnitude": (0, 0, 0.0, 0.0),
            "fisher": (4 * weights, gradients, 3.0 * forward * gradients, 0.0),
            # Factor, inverse and update of a block: about (1/3 + 2/3 + 1/3) size^3 multiplications and additions.
            "obs": (
                curvature.memory_needed(weights, options.block, "unstructured"),
                gradients,
                3.0 * forward * gradients + 2.0 * options.gradients * size * weights,
                2 * ROUNDS * 4 / 3 * size**2 * weights,
            ),
            # Forward passes: one of the teacher, four halves on average and one whole of the student.
            "hessian": (
                layerwise.memory_needed(calibration, hidden, inner, weights + VOCABULARY * hidden),
                calibration,
                4.0 * forward * calibration + 2.0 * moments * calibration + layers * fits,
                0.0,
            ),
        }
        for score, (memory, tokens, flop, flop64) in costs.items():
            seconds = flop / options.rate / 1e9 + flop64 / options.rate64 / 1e9
            found.append(
                {
                    "model": name,
                    "weights": weights,
                    "score": score,
                    "memory_gb": round(memory / 1e9, 2),
                    "tokens": tokens,
                    "tflop": round((flop + flop64) / 1e12, 2),
                    "minutes": round(seconds / 60, 1),
                }
            )
    return found


def main() -> None:
    """Print the table for the options given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=512, help="examples of score hessian (512)")
    parser.add_argument("--gradients", type=int, default=1024, help="gradients of scores fisher and obs (1024)")
    parser.add_argument("--block", type=int, default=50, help="weights per block of score obs (50)")
    parser.add_argument("--length", type=int, default=128, help="tokens per example (128)")
    parser.add_argument("--rate", type=float, default=60, help="GFLOP/s in float32 (60: two cores)")
    parser.add_argument("--rate64", type=float, default=4, help="GFLOP/s of small float64 factorizations (4)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table = rows(options)
    if options.json:
        print(json.dumps(table, indent=2))
        return
    print("| model | weights, million | score | memory beside the model, GB | tokens | TFLOP | minutes |")
    print("| --- | --: | --- | --: | --: | --: | --: |")
    for row in table:
        print(
            f"| {row['model']} | {row['weights'] / 1e6:.1f} | {row['score']} | {row['memory_gb']:.1f} | "
            f"{row['tokens']:,} | {row['tflop']:.1f} | {row['minutes']:.1f} |"
        )


if __name__ == "__main__":
    main()
