"""What `pruneofa bench` measures, as the record that it prints and keeps."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pruneofa.bench.break_even import break_even as break_even_rows
from pruneofa.bench.measure import Bench
from pruneofa.bench.models import Settings, describe, read_cases, read_models
from pruneofa.errors import InputError
from pruneofa.formats.files import write_json
from pruneofa.progress import progress

FORMAT = "pruneofa-bench"


def run(
    settings: Settings, *, break_even: bool = False, keep: Callable[[dict[str, Any]], Any] = lambda record: None
) -> dict[str, Any]:
    """Measure every case, and optionally the break-even per layer; returns the record that `--json` prints.

    `keep` is called with the record so far, with "complete" false, whenever a runner has been timed, so that the caller
    has these results even if a later measurement fails.

    Raises:
        InputError: a peer, case or model that cannot be measured.
        CheckFailed: pruneofa's output differs from torch's by more than the tolerance; it is then not timed.
    """
    bench = Bench(settings)
    record: dict[str, Any] = {"format": FORMAT, "version": 1, "complete": False} | bench.head()
    record |= {"models": [], "rows": [], "break_even": [], "left_out": bench.left_out}
    keep(record)
    with tempfile.TemporaryDirectory(prefix="pruneofa-bench-") as temporary:
        root = Path(temporary)
        models = list(read_models(settings, root))
        record["models"] = [describe(model) for model in models]
        cases = read_cases(settings, models[0])
        total = sum(bench.steps(len(models)) for _ in cases)
        with progress("bench", total) as advance:
            for index, case in enumerate(cases):
                for row in bench.measure(case, models, root, advance):
                    record["rows"][index:] = [row]
                    keep(record)
        tokens = sorted({sum(case.lengths) for case in cases if len(set(case.lengths)) == 1})
        for row in break_even_rows(bench, models[0], tokens or [128]) if break_even else ():
            record["break_even"].append(row)
            keep(record)
    record["complete"] = True
    record["machine"]["load_average"][1] = os.getloadavg()[0]
    keep(record)
    return record


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write the file of `--record`, whole or not at all. Raises InputError where it cannot be written."""
    try:
        write_json(path, record)
    except OSError as error:
        raise InputError(f"--record {path}: {error.strerror}; choose a file that you may write") from error
