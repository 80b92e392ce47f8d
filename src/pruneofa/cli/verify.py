"""The verb `verify`."""

import argparse
import sys
from typing import Any

from pruneofa.cli.show import print_value
from pruneofa.errors import InputError, printable


def describe(verb: argparse.ArgumentParser) -> None:
    """Check that every zero of BASE's pattern is exactly zero in DERIVED; exit 1 if not.

    The encoder's linear weights are compared, and the pooler if both models have one. Of a packed model those are the
    weights as stored: int8 codes times their scales.
    """
    verb.epilog = "example: pruneofa verify runs/minilm-90/sparse runs/minilm-90/tasks/sst2/seed-0/transfer"
    verb.add_argument("base", help="folder or hub id of the sparse pre-trained model, packed or not")
    verb.add_argument("derived", help="folder or hub id of a model derived from it, packed or not")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.formats.verify import verify

        found = verify(options.base, options.derived)
        if not found["checked"] and found["ok"]:
            raise InputError(
                f"{options.base}: no weight of its encoder is zero, so there is nothing to keep; give the sparse model "
                "as BASE, and the one made from it as DERIVED"
            )

        def show() -> None:
            for layer in found["revived"]:
                sys.stdout.write(f"revived: {printable(layer['layer'])}: {layer['count']} weights\n")
            for layer in found["not_finite"]:
                sys.stdout.write(f"NaN or infinite: {printable(layer['layer'])}: {layer['count']} weights\n")
            for layer in found["missing"]:
                sys.stdout.write(f"missing: {printable(layer)}\n")
            if found["missing_pooler"]:
                sys.stdout.write("the derived model has no pooler (question-answering models have none)\n")
            sys.stdout.write(f"{conclusion(found)}\n")

        print_value(found, options.json, show)
        return 0 if found["ok"] else 1

    verb.set_defaults(call=call)


def conclusion(found: dict[str, Any]) -> str:
    """The last line of `verify`: of a result of `formats.verify`."""
    if found["ok"]:
        return f"ok: every zero of BASE is zero in DERIVED, which has {found['extra_zeros']:,} zeros more"
    revived, missing = found["revived"], found["missing"]
    reasons = []
    if revived:
        count = sum(layer["count"] for layer in revived)
        verb = "is" if count == 1 else "are"
        layers = _counted(len(revived), "layer")
        reasons.append(f"{_counted(count, 'zero')} of BASE {verb} not zero in DERIVED, in {layers}")
    if broken := sum(layer["count"] for layer in found["not_finite"]):
        reasons.append(f"{_counted(broken, 'weight')} of DERIVED {'is' if broken == 1 else 'are'} NaN or infinite")
    if missing:
        reasons.append(f"DERIVED lacks {_counted(len(missing), 'layer')} of BASE")
    return f"FAILED: {'; '.join(reasons)}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
