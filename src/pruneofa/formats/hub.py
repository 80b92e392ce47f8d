"""The local folder of a model: the given folder, or a snapshot of a hub model."""

import re
from pathlib import Path

from pruneofa.errors import InputError, first_line

# The files of a model folder that may be needed, with weights that are not pickles.
FILES = ("*.json", "*.safetensors", "*.zst", "*.txt", "*.model")


def check_inside(file: Path, folder: Path) -> None:
    """Raises InputError if `file` is a link out of its folder: a copy would hold a file that is not the model's.

    In the hub's cache the files of a snapshot are links to the blobs of the same model.
    """
    real, inside = file.resolve(), folder.resolve()
    cached = inside.parent.name == "snapshots" and real.is_relative_to(inside.parents[1] / "blobs")
    if not (real.is_relative_to(inside) or cached):
        raise InputError(f"{file}: a link to {real}, outside the folder; wanted the file itself; copy it into {folder}")


def local_folder(path: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """The folder at `path`, or a snapshot of the hub model of that id, which holds only `files` (glob patterns).

    Raises InputError when it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the model's folder that contains it")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or str(path).startswith("."):
        raise InputError(f"{path}: no such folder; give a Hugging Face folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except Exception as error:  # hub, HTTP and validation errors have no common type
        raise InputError(f"{path}: no such folder, and the hub has no such model ({first_line(error)})") from None
