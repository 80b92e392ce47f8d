"""Copy the records of a run into results/NAME: recipe, metrics, logs and versions; no weights, no local paths.

    python results/collect.py runs/minilm-90

An unfinished run can be collected too: the complete stages are copied.
"""

import shutil
import sys
from pathlib import Path

from pruneofa.recipe import load, to_yaml
from pruneofa.report.render import portable

WHOLE = ("run.json", "results.json", "table.md", "log.jsonl")
OF_A_STAGE = ("metrics.json", "evaluation.json", "engine.json", "stage.json")


def main(run: Path) -> None:
    """Refresh results/NAME from a run's folder."""
    recipe = load([run / "recipe.yaml"])
    target = Path(__file__).parent / recipe.name
    target.mkdir(exist_ok=True)
    shown = portable(recipe.model_dump()) | {"data_root": None}
    (target / "recipe.yaml").write_text(to_yaml(shown), encoding="utf-8")
    stages = [file.parent for file in run.rglob("stage.json") if ".work" not in file.parts]
    files = [run / name for name in WHOLE] + [stage / name for stage in stages for name in OF_A_STAGE]
    for file in files:
        if file.exists():
            copy = target / file.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    sys.stdout.write(f"{target}: {len(stages)} complete stages\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
