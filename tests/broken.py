"""Golden packed folders, broken on purpose.

`seal` makes manifest and file agree again after a change, so that the check behind size and checksum is reached.
"""

import json
import shutil
import zlib

import numpy as np
import pytest

from pruneofa.errors import InputError
from pruneofa.formats.files import read_json
from pruneofa.formats.manifest import MANIFEST, TENSORS
from pruneofa.formats.packed import read
from tests.golden import GOLDEN

QUERY = "encoder.layer.0.attention.self.query.weight"
OUTPUT = "encoder.layer.0.output.dense.weight"
WORDS = "embeddings.word_embeddings.weight"
HUGE = 10**12
REMOVED = object()
WRONG = [
    REMOVED,
    None,
    True,
    -1,
    0,
    2.5,
    float("inf"),
    10**30,
    int("9" * 400),
    "x",
    "\ud800",
    [],
    {},
    [[]],
    {"kind": "static"},
]


def copy(variant, tmp_path):
    return shutil.copytree(GOLDEN / variant, tmp_path / variant)


def refused(folder):
    """The one line that `read` stops with."""
    with pytest.raises(InputError) as caught:
        read(folder)
    text = str(caught.value)
    assert text.startswith(str(folder)) and text.isascii() and "\n" not in text and len(text) < 700
    return text


def write(folder, manifest):
    (folder / MANIFEST).write_text(json.dumps(manifest))


def parts(folder):
    """Header and data of the tensor file."""
    raw = (folder / TENSORS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def seal(folder, head, data):
    """Write a tensor file whose size and checksum the manifest states."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    raw = len(text).to_bytes(8, "little") + text + data
    (folder / TENSORS).write_bytes(raw)
    state(folder, raw)


def state(folder, raw):
    manifest = read_json(folder / MANIFEST)
    manifest["checksum"] = f"crc32:{zlib.crc32(raw):08x}"
    manifest["sizes"]["file"] = len(raw)
    write(folder, manifest)


def put(folder, name, edit):
    """Change the bytes of a tensor through `edit(array)`, in place."""
    head, data = parts(folder)
    start, end = head[name]["data_offsets"]
    array = np.frombuffer(data[start:end], {"F32": "<f4", "I8": "i1", "U8": "u1"}[head[name]["dtype"]])
    array = array.reshape(head[name]["shape"]).copy()
    edit(array)
    seal(folder, head, data[:start] + array.tobytes() + data[end:])


def paths(value, path=()):
    """The path of every field of a JSON value."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from paths(item, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def replaced(manifest, path, value):
    """A copy with one field replaced, or removed."""
    changed = json.loads(json.dumps(manifest))
    inner = at(changed, path[:-1])
    if value is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed
