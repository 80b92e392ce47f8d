"""The tensors of a Hugging Face folder's safetensors files, located by the headers and read one at a time.

A .bin file is a pickle, which only torch can read; if torch is installed, `weights_folder` converts it to safetensors.
"""

import json
import math
import os
import pickle
import shlex
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa.errors import InputError, first_line, short
from pruneofa.formats.cache import cached_folder
from pruneofa.formats.files import (
    MAX_JSON,
    cache_root,
    file_fingerprint,
    fingerprint,
    is_there,
    open_regular,
    read_json,
    user_path,
)
from pruneofa.formats.hub import FILES, check_inside, local_folder

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor: file, safetensors dtype name, shape, offset of its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names.

    Raises InputError for a folder without them, that is packed, with only a .bin file, or with a shard missing.
    """
    if found := whole_or_shards(folder, "model.safetensors"):
        return found
    if binaries := _binaries(folder):
        raise InputError(_only_binaries(folder, binaries))
    if any(folder.glob("model.packed.*")):
        raise InputError(f"{folder}: is packed; make an ordinary folder first: pruneofa unpack {folder} FOLDER")
    inside = sorted({file.parent.name for file in folder.glob("*/model.safetensors*")})
    hint = f", such as {' or '.join(str(folder / name) for name in inside[:3])}" if inside else ""
    if others := sorted(file.name for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)):
        hint = f" (got {', '.join(others[:3])}, which nothing says is the model)"
    raise InputError(f"{folder}: no model.safetensors in it; wanted a Hugging Face model folder{hint}")


def weights_folder(path: str | Path) -> Path:
    """The folder at `path`, or of the hub model of that id, with weights that can be read.

    If it has only a .bin file, the result is a copy with safetensors in the cache, made once by torch with
    weights_only=True. Raises InputError as `local_folder` does, for a .bin file if torch is not installed, and for one
    that is damaged or contains other objects than weights.
    """
    folder = local_folder(path)
    if whole_or_shards(folder, "model.safetensors"):
        return folder
    if not user_path(path).is_dir():
        folder = local_folder(path, (*FILES, "pytorch_model*.bin"))
    if not (binaries := _binaries(folder)):
        return folder
    kinds = ("*.json", "*.txt", "*.model", "[0-9]*_*/config.json")  # the last: modules of sentence-transformers
    beside = sorted(file for kind in kinds for file in folder.glob(kind))
    for file in [*binaries, *beside]:
        check_inside(file, folder)
    key = fingerprint({str(file.relative_to(folder)): file_fingerprint(file) for file in [*binaries, *beside]})
    copy = cache_root() / "models" / key[:32]

    def convert(target: Path) -> None:
        weights = _read_binaries(folder, binaries)
        from safetensors.torch import save_file

        save_file(weights, target / "model.safetensors", {"format": "pt"})
        for file in beside:
            into = target / file.relative_to(folder)
            into.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, into)

    cached_folder(copy, convert)
    return copy


def unsafe_binary(path: str | Path) -> str:
    """The error message for a .bin file that torch refuses to read with weights_only=True."""
    return (
        f"model {path}: its .bin file contains more than weights and could run code, so it was not loaded; "
        "wanted model.safetensors"
    )


def _read_binaries(folder: Path, binaries: list[Path]) -> dict[str, Any]:
    """Every torch.Tensor of .bin files, each with its own memory, because safetensors has no shared tensors."""
    try:
        import torch
    except ImportError:
        raise InputError(_only_binaries(folder, binaries)) from None
    weights: dict[str, Any] = {}
    for file in binaries:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; unsafe content is refused below
                found = torch.load(file, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:
            raise InputError(unsafe_binary(folder)) from None
        except Exception as error:  # torch's errors for a damaged file have no common type
            raise InputError(f"{file}: damaged ({first_line(error)}); copy or download it again") from None
        if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise InputError(
                f"{file}: contains objects other than tensors; wanted the state_dict of a transformers model"
            )
        weights |= {name: value.clone().contiguous() for name, value in found.items()}
    return weights


def _binaries(folder: Path) -> list[Path]:
    return whole_or_shards(folder, "pytorch_model.bin")


def _only_binaries(folder: Path, binaries: list[Path]) -> str:
    command = (
        "import sys, torch; from safetensors.torch import save_file; "
        "w = {k: v.clone() for f in sys.argv[2:] for k, v in torch.load(f, weights_only=True).items()}; "
        "save_file(w, sys.argv[1], {'format': 'pt'})"
    )
    files = " ".join(shlex.quote(str(path)) for path in [folder / "model.safetensors", *binaries])
    return (
        f"{folder}: only a .bin file, which may run code when loaded and needs torch; wanted model.safetensors; where "
        f'torch is installed, convert it with: python -c "{command}" {files}'
    )


def whole_or_shards(folder: Path, name: str) -> list[Path]:
    """The file of this name, or the shards that its index names, as transformers reads them; no other file counts."""
    index = folder / f"{name}.index.json"
    if is_there(folder / name):
        return [folder / name]
    if not is_there(index):
        return []
    shards = read_json(index, "download it again").get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise InputError(f"{index}: weight_map is {short(shards)}; wanted file names by tensor; download it again")
    names = sorted(set(shards.values()))
    for file in names:
        plain = os.path.basename(file) == file and file.isprintable() and len(file.encode()) <= 255
        if not plain or not (folder / file).is_file():
            raise InputError(f"{index}: names {short(file)}, which is not in {folder}; download the missing shard")
    return [folder / file for file in names]


def tensors_of(file: Path) -> list[tuple[str, StoredTensor]]:
    """Name and location of every tensor of a safetensors file.

    The library checks that the file is complete. Raises InputError when it is not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_JSON:
                raise InputError(
                    f"{file}: its header has {length} bytes; wanted at most {MAX_JSON}; copy or download it again"
                )
            header = json.loads(stream.read(min(length, os.fstat(stream.fileno()).st_size)))
        with safe_open(file, framework="numpy"):
            pass
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise InputError(f"{file}: not a complete safetensors file ({reason}); copy or download it again") from None
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
