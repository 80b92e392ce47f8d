"""The tensors of a Hugging Face folder's safetensors files, found by their headers and read one at a time."""

import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pruneofa.errors import InputError

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, dtype name of safetensors, shape, first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names.

    Raises InputError for a folder without them, with only a .bin file, or with a shard missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a valid index of shards ({error}); download it again") from None
        for name in names:
            if os.path.basename(name) != name or not (folder / name).is_file():
                raise InputError(f"{index}: names {name}, which is not in {folder}; download the missing shard")
        return [folder / name for name in names]
    if binaries := sorted(folder.glob("pytorch_model*.bin")):
        command = (
            "import sys, torch; from safetensors.torch import save_file; "
            "w = {k: v.clone() for f in sys.argv[2:] for k, v in torch.load(f, weights_only=True).items()}; "
            "save_file(w, sys.argv[1], {'format': 'pt'})"
        )
        files = " ".join(shlex.quote(str(path)) for path in [single, *binaries])
        raise InputError(
            f"{folder}: only a .bin file, which may run code when read; wanted model.safetensors; convert it "
            f'with: python -c "{command}" {files}'
        )
    raise InputError(f"{folder}: no model.safetensors in it; wanted a Hugging Face model folder")


def tensors_of(file: Path) -> list[tuple[str, StoredTensor]]:
    """Name and place of every tensor of a safetensors file.

    The library checks that the file is whole. Raises InputError when it is not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a complete safetensors file ({error}); copy or download it again") from None
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return [
        (name, StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]))
        for name, entry in header.items()
    ]


def read_tensor(name: str, stored: StoredTensor) -> np.ndarray:
    """The tensor; bfloat16 becomes float32, everything else keeps its dtype. Raises InputError for an unknown dtype."""
    if stored.dtype not in _DTYPES:
        raise InputError(f"{stored.file}: {name} has dtype {stored.dtype}; wanted one of {', '.join(_DTYPES)}")
    count = math.prod(stored.shape)
    raw = np.fromfile(stored.file, _DTYPES[stored.dtype], count, offset=stored.start)
    if stored.dtype == "BF16":  # the upper half of a float32
        raw = (raw.astype("<u4") << 16).view("<f4")
    return raw.reshape(stored.shape)
