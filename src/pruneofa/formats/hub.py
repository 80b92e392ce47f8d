"""The local folder of a model: the given folder, or a snapshot of a hub model."""

import re
from pathlib import Path

from pruneofa.errors import InputError, first_line

# The files of a model folder that may be needed, with weights that are not pickles.
FILES = ("*.json", "*.safetensors", "*.zst", "*.txt", "*.model")


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
