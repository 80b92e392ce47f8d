"""`pruneofa bench`: its options, and what it prints. Heavy imports happen when it is called."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pruneofa import families


def describe(verb: argparse.ArgumentParser) -> None:
    """This engine beside every peer that is installed: same weights, inputs and threads, outputs verified first."""
    verb.usage = "pruneofa bench (PATH | --random SHAPE) [options]"
    verb.epilog = "example: pruneofa bench runs/minilm-90/sparse --seq 32 128 --mixed --break-even"
    add = verb.add_argument
    add("path", nargs="?", help="folder or hub id, packed or not; what is measured is the encoder")
    add("--random", metavar="SHAPE", help=f"random weights instead: {', '.join(families.shapes())}")
    add("--sparsity", type=float, default=0.9, metavar="S", help="zeros of --random (default 0.9)")
    add("--pattern", default="unstructured", metavar="P", help="of --random: unstructured (default), 4x1 or 1x4")
    add("--also", nargs="+", default=[], metavar="MODEL",
        help="more models for our engine in the same run: a folder; with --random, PATTERN@SPARSITY")  # fmt: skip
    add("--seq", nargs="+", type=int, default=[], metavar="N", help="tokens of a sequence (default 32 128 384)")
    add("--batch", type=int, default=1, metavar="N", help="sequences of these lengths together (default 1)")
    add("--mixed", nargs="*", metavar="NxA-B",
        help="batches of N sequences of A to B tokens (default 32x8-128), which peers get padded")  # fmt: skip
    add("--threads", type=int, metavar="N", help="of every runner (default: as the engine chooses)")
    add("--isa", metavar="ISA", help="hold ours and the peers to amx, avx512vnni, avxvnni, avx2 or scalar")
    add("--precision", choices=["int8", "fp32"], default="int8", help="of ours (default int8)")
    add("--peers", nargs="*", metavar="PEER", help="compare with these (default: all installed; none: alone)")
    add("--python", action="append", default=[], metavar="PEER=FILE", help="the interpreter that has PEER")
    add("--repeats", type=int, default=30, metavar="N", help="timed runs of each (default 30)")
    add("--limit", type=float, default=600, metavar="S",
        help="seconds that a step of a peer may take; then it is left out (default 600)")  # fmt: skip
    add("--work", type=Path, metavar="DIR", help="keep what is exported for the peers for the next run")
    add("--record", type=Path, metavar="FILE", help="write the record here as JSON, again after every round")
    add("--peak", type=float, metavar="X", help="10^12 operations/s the machine can do, to report our share")
    add("--break-even", action="store_true", help="per layer: from which sparsity the zeros pay on this machine")
    add("--at-least", type=float, metavar="X", help="exit 1 unless every dense peer takes X times our time")
    add("--picture", type=Path, metavar="FILE", help="draw the medians: .svg or .html")
    add("--json", action="store_true", help="print the record as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.bench import measure, tables

        if options.picture:
            tables.check_picture(options.picture)
        record: dict[str, Any] = {}

        def keep(found: dict[str, Any]) -> None:
            record.update(found)
            if options.record:
                measure.write_record(found, options.record)

        try:
            measure.run(measure.settings_of(options), break_even=options.break_even, keep=keep)
        except BaseException as error:
            if record.get("rows"):
                _show(record, options.json)
            if isinstance(error, KeyboardInterrupt):
                known = "what was measured until then is above" if record.get("rows") else "nothing was measured yet"
                raise KeyboardInterrupt(known) from None
            raise
        _show(record, options.json)
        if options.picture:
            tables.picture(record, options.picture)
        if options.at_least is not None:
            measure.check_ratio(record, options.at_least)
        return 0

    verb.set_defaults(call=call)


def _show(record: dict[str, Any], as_json: bool) -> None:
    from pruneofa.bench import tables

    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
        return
    found = [tables.case_rows(row) for row in record["rows"]] + [tables.break_even_rows(record["break_even"])]
    sys.stdout.write("".join(map(tables.aligned, found)))
    sys.stdout.write("".join(f"{line}\n" for line in tables.remarks(record)))
