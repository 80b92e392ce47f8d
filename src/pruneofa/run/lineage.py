"""The sparse model that a run made a task model from, and whether its zeros are all there still. No torch."""

import re
from pathlib import Path

from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.files import read_json

_STAGE = re.compile(r"tasks/.+/(transfer|ptq|quantize|control)")


def sparse_of_run(model: Path) -> str | None:
    """The sparse model that a run made this task model from; None for a dense one, or a model from elsewhere."""
    folder = model.resolve()
    root = folder.parents[3] if len(folder.parents) > 3 else folder
    if not (folder / "stage.json").is_file() or not (root / "recipe.yaml").is_file():
        return None
    record = read_json(folder / "stage.json")
    stage = _STAGE.fullmatch(str(record.get("stage"))) if isinstance(record, dict) else None
    if stage is None:
        return None
    if stage[1] == "control":
        return str(root / "control")
    from pruneofa.recipe import load

    recipe = load([root / "recipe.yaml"])
    if not recipe.prune:
        return recipe.model
    return str(root / "sparse") if (root / "sparse").exists() else None


def lost_pattern(sparse: str, model: str) -> str | None:
    """One line with layer and count where zeros of `sparse` are not zero in `model`; None where all are."""
    found = pattern.verify(sparse, model)
    if found["ok"]:
        return None
    what = [f"{layer['layer']}: {layer['count']} revived" for layer in found["revived"]]
    what += [f"{layer}: missing" for layer in found["missing"]]
    more = f" (and {len(what) - 1} more layers)" if len(what) > 1 else ""
    return f"{model}: lost the pattern of {sparse}: {what[0]}{more}; make it again with its pattern locked"


def check_lock(folder: Path) -> None:
    """Raise InputError where zeros of a run's sparse model are not zero in a task model that lies in that run.

    Nothing is known of a folder that lies elsewhere. A sparse model that came from the hub, or as a .bin file, is not
    fetched for this: `pruneofa verify` compares with it.
    """
    try:
        sparse = sparse_of_run(folder)
    except InputError:  # the recipe of another version says nothing about this model
        return
    # A relative path in a recipe was relative to where the run was started, which need not be here.
    known = sparse is not None and Path(sparse).is_absolute() and any(Path(sparse).glob("*.safetensors"))
    if known and (lost := lost_pattern(str(sparse), str(folder))):
        raise InputError(lost)
