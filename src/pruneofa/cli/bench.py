"""The verb `bench`: its options and its output. Heavy imports happen when it is called."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pruneofa import families
from pruneofa.cli.options import ISAS
from pruneofa.cli.show import printable_lines
from pruneofa.errors import printable


def describe(verb: argparse.ArgumentParser) -> None:
    """Measure the speed, memory and size of the engine and of every installed peer on this machine.

    All runners get the same weights, inputs and number of threads, with outputs verified first against torch fp32. The
    peers are other runtimes: torch, onnxruntime, openvino and deepsparse, in fp32, bf16 or int8.
    """
    verb.usage = "pruneofa bench (PATH | --random SHAPE) [options]"
    verb.epilog = (
        "example: pruneofa bench runs/minilm-90/sparse --seq 32 128; without a model: "
        "pruneofa bench --random minilm --sparsity 0.9"
    )
    add = verb.add_argument
    add("path", nargs="?", help="folder or hub id, packed or not; only its encoder is measured")
    add(
        "--random",
        metavar="SHAPE",
        help=f"random weights of a known shape instead of PATH: {', '.join(families.shapes())}",
    )
    add("--sparsity", type=float, default=0.9, metavar="S", help="sparsity of --random (default 0.9)")
    add(
        "--pattern",
        default="unstructured",
        metavar="P",
        help="sparsity pattern of --random: unstructured (default), 4x1 or 1x4",
    )
    add("--also", nargs="+", default=[], metavar="MODEL",
        help="further models to measure with the engine only: folders; with --random, PATTERN@SPARSITY")  # fmt: skip
    add(
        "--seq",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="tokens per sequence, one case each (default 32 128 384; with --mixed none)",
    )
    add("--batch", type=int, default=1, metavar="N", help="sequences per batch (default 1)")
    add("--mixed", nargs="*", metavar="NxA-B",
        help="batches of N sequences of A to B tokens (no value: 32x8-128); padded for peers")  # fmt: skip
    add("--threads", type=int, metavar="N", help="threads of every runner (default: as many as the engine chooses)")
    add(
        "--isa",
        metavar="ISA",
        help=f"limit engine and peers to this instruction set: {ISAS}",
    )
    add("--precision", choices=["int8", "fp32"], default="int8", help="precision of the engine (default int8)")
    add(
        "--peers",
        nargs="*",
        metavar="PEER",
        help="compare with these peers only, or with `none` (default: all installed ones)",
    )
    add(
        "--python",
        action="append",
        default=[],
        metavar="PEER=FILE",
        help="Python interpreter in which PEER is installed",
    )
    add("--repeats", type=int, default=30, metavar="N", help="timed runs of every runner (default 30)")
    add("--limit", type=float, default=600, metavar="S",
        help="maximum seconds per step of a peer; a slower peer is left out (default 600)")  # fmt: skip
    add(
        "--work", type=Path, metavar="DIR", help="folder that keeps the models exported for the peers, for the next run"
    )
    add("--record", type=Path, metavar="FILE", help="write the record to FILE as JSON after every round")
    add(
        "--peak",
        type=float,
        metavar="X",
        help="peak of the machine in 10^12 operations per second (default: measured before and after each row)",
    )
    add(
        "--break-even",
        action="store_true",
        help="also the sparsity from which each layer is faster than dense int8 on this machine",
    )
    add("--at-least", type=float, metavar="X", help="exit 1 unless the engine is X times as fast as every dense peer")
    add("--picture", type=Path, metavar="FILE", help="draw a chart of the medians: .svg or .html")
    add("--json", action="store_true", help="print the record as JSON")

    verb.set_defaults(call=_bench)


def _bench(options: argparse.Namespace) -> int:
    from pruneofa.bench import figures, measure, records, tables

    if options.picture:
        tables.check_picture(options.picture)
    record: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        record.update(found)
        if options.record:
            records.write_record(found, options.record)

    try:
        records.run(measure.settings_of(options), break_even=options.break_even, keep=keep)
    except BaseException as error:
        if record.get("rows"):
            _show(record, options.json)
        if isinstance(error, KeyboardInterrupt):
            known = "the measurements so far are above" if record.get("rows") else "nothing was measured yet"
            raise KeyboardInterrupt(known) from None
        raise
    _show(record, options.json)
    if options.picture:
        tables.picture(record, options.picture)
    if options.at_least is not None:
        figures.check_ratio(record, options.at_least)
    return 0


def _show(record: dict[str, Any], as_json: bool) -> None:
    from pruneofa.bench import tables

    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
        return
    found = [tables.case_rows(row) for row in record["rows"]] + [tables.break_even_rows(record["break_even"])]
    sys.stdout.write(printable_lines("".join(map(tables.aligned, found))))
    sys.stdout.write("".join(f"{printable(line)}\n" for line in tables.remarks(record)))
