"""The folder to which relative data paths refer."""

from pathlib import Path

from pruneofa.errors import InputError
from pruneofa.formats.files import user_path


def root_folder(data_root: str | Path | None) -> Path:
    """The folder `data_root`; the working directory if it is None. Raises InputError if it does not exist."""
    root = user_path(data_root or ".")
    if not root.is_dir():
        raise InputError(f"data_root {data_root}: no such folder; give the folder to which relative data paths refer")
    return root
