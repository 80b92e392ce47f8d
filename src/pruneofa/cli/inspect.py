"""The verb `inspect`."""

import argparse

from pruneofa.cli.show import print_value, show_model
from pruneofa.engine.lanes import Plan

# Batches whose division among threads is shown.
CASES = {"1 text of 32 tokens": [32], "1 text of 128 tokens": [128], "32 texts of 64 tokens": [64] * 32}


def describe(verb: argparse.ArgumentParser) -> None:
    """Print the sparsity per layer, non-zeros, pattern hash and sizes of a model, packed or not.

    Nothing is written. Sizes are given dense, as non-zeros with a bitmask, and as a bound by entropy.
    """
    verb.epilog = "example: pruneofa inspect runs/minilm-90/sparse --engine"
    verb.add_argument("path", help="folder or hub id")
    verb.add_argument(
        "--engine", action="store_true", help="also how the engine computes each layer in int8 on this machine, and why"
    )
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.formats import packed, pattern
        from pruneofa.formats.manifest import is_packed
        from pruneofa.formats.tensors import weights_folder

        folder = weights_folder(options.path)
        found = packed.inspect(folder) if is_packed(folder) else pattern.inspect(folder)
        if options.engine:
            from pruneofa.engine.engine import Engine

            engine = Engine.from_pretrained(folder)

            def lanes(made: Plan) -> str:
                text = f"{made.lanes} x {made.width} {'thread' if made.width == 1 else 'threads'}"
                if made.spare:
                    text += f"; {made.spare} more would lose at {engine.barriers} barriers what they gain"
                return text

            layers = dict(engine.choices())
            found["engine"] = {
                "isa": engine.isa,
                "activations": engine.activations,
                "threads": engine.threads,
                "threads_reason": engine.threads_reason,
                "barriers": engine.barriers,
                "lanes": {case: lanes(engine.plan(lengths)) for case, lengths in CASES.items()},
                "layers": layers,
            }
        print_value(found, options.json, lambda: show_model(found))
        return 0

    verb.set_defaults(call=call)
