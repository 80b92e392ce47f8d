"""The sparse model that a task model of a run was made from, and whether the task model kept its zeros. No torch."""

from pathlib import Path

from pruneofa.errors import InputError
from pruneofa.formats.files import read_json
from pruneofa.formats.verify import verify
from pruneofa.run.names import RECORD, StageId

SPARSE = ("transfer", "ptq", "quantize")  # variants that come from the sparse model


def stage_of(folder: Path) -> StageId | None:
    """The stage that made this folder; None if there is none. Raises InputError for a record without its name."""
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    if missing := {"task", "seed", "variant"} - set(record):
        raise InputError(
            f"{folder / RECORD}: no {', '.join(sorted(missing))}, which every stage writes; restore the file, or "
            "delete the folder to make it again"
        )
    return StageId(record["task"], record["seed"], record["variant"])


def sparse_of_run(model: Path) -> str | None:
    """The sparse model that a run made this task model from; None for a dense one, or a model from elsewhere.

    Raises as `stage_of`, and as `load` does for the run's recipe.
    """
    folder = model.resolve()
    stage = stage_of(folder)
    if stage is None or stage.task is None:
        return None
    inside = Path(stage.path).parts
    root = Path(*folder.parts[: -len(inside)])
    if folder.parts[-len(inside) :] != inside or not (root / "recipe.yaml").is_file():
        return None
    start = root / StageId(None, None, "control" if stage.variant == "control" else "prune").path
    if stage.variant == "control":
        return str(start) if start.exists() else None
    if stage.variant not in SPARSE:
        return None
    try:
        from pruneofa.recipe import load
    except ImportError:  # the base install cannot read recipes; most have made their sparse model themselves
        pass
    else:
        recipe = load([root / "recipe.yaml"])
        if not recipe.prune:
            return recipe.model
    return str(start) if start.exists() else None


def sparse_here(model: Path) -> tuple[str | None, str | None]:
    """`sparse_of_run` if its zeros can be read here, else None; and why they cannot, if the run has such a model."""
    try:
        sparse = sparse_of_run(model)
    except InputError as error:  # such as the recipe of a later version
        return None, str(error)
    # A relative path in a recipe is relative to the folder where the run was started, which may be another one.
    if sparse is None or (Path(sparse).is_absolute() and any(Path(sparse).glob("*.safetensors"))):
        return sparse, None
    return None, f"its run names the sparse model {sparse}, which is no folder with safetensors here"


def lost_pattern(sparse: str, model: str) -> str | None:
    """One line with layer and count if zeros of `sparse` are not zero in `model`; None if all are zero.

    So it is for weights of `model` that are NaN or infinite.
    """
    found = verify(sparse, model)
    if found["ok"]:
        return None
    if found["not_finite"]:
        first = found["not_finite"][0]
        return (
            f"{model}: {first['layer']} has {first['count']} NaN or infinite weights; train again, with a lower lr or "
            "precision: fp32"
        )
    what = [f"{layer['layer']}: {layer['count']} revived" for layer in found["revived"]]
    what += [f"{layer}: missing" for layer in found["missing"]]
    more = f" (and {len(what) - 1} more layers)" if len(what) > 1 else ""
    return f"{model}: lost the pattern of {sparse}: {what[0]}{more}; make it again with its pattern locked"


def check_lock(folder: Path) -> None:
    """Raise InputError if zeros of a run's sparse model are not zero in a task model in that run's folder.

    Folders elsewhere are not checked. A sparse model that came from the hub, or as a .bin file, is not fetched for this
    check; use `pruneofa verify` to compare with it.
    """
    sparse, _ = sparse_here(folder)
    if sparse is not None and (lost := lost_pattern(sparse, str(folder))):
        raise InputError(lost)
