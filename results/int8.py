"""Evaluate the sparse task models of a run in int8 by the engine, and keep it in results/NAME:

    python results/int8.py runs/sst2 --data-root DATA

Every model is packed as for deployment. Beside the record of each in results/NAME, which `collect.py` made, comes
int8.json: the metrics, the kernels, pruneofa's version, and the fingerprint of the model's settings and inputs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from pruneofa.formats.files import read_json, write_json
from pruneofa.run.names import RECORD

FILE = "int8.json"


def evaluated(folder: Path, task: str) -> list[dict[str, float]]:
    """The metrics of int8 by the engine, of every seed of a task of the run in `folder`, results/NAME.

    Raises ValueError where one is of other settings or inputs than the record beside it.
    """
    found = []
    for model in sorted(folder.glob(f"tasks/{task}/seed-*/transfer")):
        int8 = read_json(model / FILE)
        if int8["fingerprint"] != read_json(model / RECORD)["fingerprint"]:
            raise ValueError(f"{model / FILE}: of other settings than {RECORD} beside it; run results/int8.py again")
        found.append(int8["metrics"])
    return found


def main() -> None:
    """Evaluate all models of the run and print where the results are."""
    from pruneofa.recipe import load  # not above: tables are made without torch
    from pruneofa.run.inputs import Inputs
    from pruneofa.train.evaluate import evaluate_by_engine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", required=True)
    options = parser.parse_args()
    recipe = load([options.run / "recipe.yaml"], [f"data_root={options.data_root}"])
    inputs = Inputs(recipe)
    for model in sorted(options.run.glob("tasks/*/seed-*/transfer")):
        target = Path(__file__).parent / recipe.name / model.relative_to(options.run)
        measured, how = evaluate_by_engine(model, inputs.task(model.parts[-3]), "int8")
        record: dict[str, Any] = {"fingerprint": read_json(model / RECORD)["fingerprint"], "metrics": measured.values}
        write_json(target / FILE, record | {name: how[name] for name in ("isa", "longest", "pruneofa")})
        sys.stdout.write(f"{target / FILE}: {measured.values}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
