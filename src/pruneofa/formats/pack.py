"""Hugging Face folder to packed folder and back (FORMAT.md). No torch; `pruneofa.formats.packed` reads.

Tensors are read one at a time: memory holds the packed model and one tensor, never the dense model.
"""

import contextlib
import hashlib
import itertools
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pruneofa import __version__, families
from pruneofa.engine.heads import sentence_head
from pruneofa.engine.tokenizer import without_tokenizer
from pruneofa.errors import InputError
from pruneofa.formats import scales as quantization
from pruneofa.formats.architecture import check_tensors, read_architecture
from pruneofa.formats.files import new_folder, write_json
from pruneofa.formats.manifest import (
    COMPRESSED,
    FORMAT,
    MANIFEST,
    MAX_RATIO,
    MAX_SLACK,
    METADATA,
    PRECISIONS,
    SOURCE_DTYPES,
    TENSORS,
    VERSION,
    Slot,
    architecture,
    canonical_name,
    check_manifest,
    figures,
    header,
    in_order,
    is_packed,
    kind_of,
    layout,
    read_config,
    read_json,
    source_name,
)
from pruneofa.formats.packed import (
    MAX_SCALE,
    Packed,
    PackedEmbedding,
    PackedLinear,
    pattern_hashes,
    pattern_holds,
    read,
)
from pruneofa.formats.pattern import POOLER, local_folder
from pruneofa.formats.scales import Quantization, QuantizationArgs
from pruneofa.formats.tensors import StoredTensor, read_tensor, tensors_of, weight_files
from pruneofa.progress import progress

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "vocab.txt", "vocab.json", "merges.txt")  # fmt: skip
_SENTENCE = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULES = ("Transformer", "Pooling", "Normalize")
_BUFFERS = ("position_ids", "token_type_ids")  # integers that transformers makes anew
_ROWS = 4096  # quantized at a time: an embedding table has tens of thousands
_CHUNK = 1 << 20


def pack(source: str | Path, out: str | Path, *, precision: str = "int8", compress: bool = False) -> dict[str, Any]:
    """Write the packed folder `out` of a Hugging Face folder or hub id; returns its manifest.

    Embedding tables become int8 with the rest, even those that quantization left float in training: `unlike_training`
    says so.

    Args:
        source: a model of one of `pruneofa.families` with safetensors weights of float32, float16 or bfloat16.
        out: a folder that does not exist yet, or is empty.
        precision: "int8", or "fp32", from which `unpack` gives every bit back.
        compress: zstd over the tensors, for transport.

    Raises:
        InputError: the source cannot be packed, the engine would not run it, or `out` holds something.
    """
    folder = local_folder(source)
    with new_output(out) as temporary:
        if not (folder / "tokenizer.json").is_file() and not is_packed(folder):
            raise InputError(without_tokenizer(folder))
        packed = pack_folder(folder, precision, show_progress=True)
        copy_settings(folder, temporary)
        manifest = _write_tensors(packed, temporary, compress)
        check_manifest(manifest, str(folder))  # what is written can be read
        whole = read_architecture(packed.config, folder)
        check_tensors(whole, packed.shapes, folder, head=sentence_head(folder) is None)  # and run
        write_json(temporary / MANIFEST, manifest)
    return manifest


def unlike_training(source: str | Path, precision: str) -> str | None:
    """One line on how the packed folder of a quantized one differs from what was trained; None if it does not."""
    if (quantized := quantization.read(local_folder(source))) is None:
        return None
    if precision == "fp32":
        return (
            f"fp32 leaves out the int8 scales of {source}: what is run as int8 later has other ones; to keep them, "
            "pack it without --precision fp32"
        )
    if quantized.embeddings is None:
        return (
            f"training left the embedding tables of {source} float, and packing made them int8: the engine does not "
            "compute exactly what was trained; to train that, quantize with embeddings: true"
        )
    return None


def unpack(packed: str | Path, out: str | Path) -> None:
    """Write the Hugging Face folder `out` of a packed folder or hub id.

    Names and dtypes are those of the source; from fp32 every bit is, from int8 the values are the rounded ones. Scales
    that the source brought are written beside them, so that packing gives the same bytes again. Raises InputError as
    `packed.read` does, or when `out` holds something.
    """
    folder = local_folder(packed)
    with new_output(out) as temporary:
        model = read(folder)
        tensors, prefix = model.manifest["tensors"], model.manifest["prefix"]
        names = {source_name(name, entry, prefix): name for name, entry in tensors.items()}
        slots = in_order({s: Slot(tensors[n]["dtype"], tuple(tensors[n]["shape"])) for s, n in names.items()})
        copy_settings(folder, temporary)
        with (
            open(temporary / "model.safetensors", "wb") as file,
            progress(f"unpacking {packed}", len(slots)) as advance,
        ):
            file.write(header(slots, {"format": "pt"}))
            for stored, slot in slots.items():
                file.write(_narrow(_dense(model, names[stored]), slot.dtype).reshape(-1).data)
                advance()
        if "quantized" in model.manifest or model.manifest["activations"]["kind"] == "static":
            quantization.write(temporary, _quantization(model))


def pack_folder(source: str | Path, precision: str = "int8", *, show_progress: bool = False) -> Packed:
    """The Hugging Face folder or hub id `source` as a packed model in memory.

    A folder that is quantized already keeps its scales, as int8; as fp32 its weights are taken as they are. The
    manifest has no "checksum" and no size of a file. Raises InputError as `pack` does.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; wanted one of {', '.join(PRECISIONS)}")
    folder = local_folder(source)
    if is_packed(folder):
        raise InputError(f"{folder}: is packed already; wanted a Hugging Face folder, such as: pruneofa unpack gives")
    config = read_config(folder)
    found = _source_tensors(folder)
    prefix = _prefix(folder, found)
    quantized = quantization.read(folder)
    known = quantized if precision == "int8" else None
    model = Packed({}, config, {}, {}, {}, folder)
    tensors: dict[str, dict[str, Any]] = {}
    digest = hashlib.sha256()
    shown = progress(f"packing {source}", len(found)) if show_progress else contextlib.nullcontext(lambda: None)
    with shown as advance:
        for name, (original, stored) in sorted(found.items()):
            weight = _read_float(original, stored)
            digest.update(f"{original}\0{stored.dtype}\0{'x'.join(map(str, weight.shape))}\0".encode())
            digest.update(weight.reshape(-1).data)
            entry: dict[str, Any] = {
                "shape": list(weight.shape), "kind": kind_of(name, weight.ndim), "dtype": stored.dtype,
            }  # fmt: skip
            if source_name(name, entry, prefix) != original:
                entry["stored_as"] = original
            if _is_tied(name, stored, weight, found):
                entry |= {"kind": "tied", "to": families.tied_to(name)}
            elif entry["kind"] == "linear":
                model.linears[name] = linear = pack_linear(weight, precision, _known_codes(known, name, weight, folder))
                entry |= {"nonzeros": linear.values.size, "pattern": pattern_of(linear.kept)}
                if linear.negative_zeros is not None:
                    entry["negative_zeros"] = int(np.bitwise_count(linear.negative_zeros).sum(dtype=np.int64))
            elif entry["kind"] == "embedding":
                codes = _known_codes(known, name, weight, folder)
                values, scale = codes or (quantize_weight(weight) if precision == "int8" else (weight, None))
                model.embeddings[name] = PackedEmbedding(values, scale)
            else:
                model.plain[name] = weight
            tensors[name] = entry
            advance()
    hashes = pattern_hashes(model.linears)
    if quantized is not None:
        quantization.check_pattern(folder, quantized, *hashes)
    sizes = figures(tensors, precision)
    model.manifest.update(
        {
            "format": FORMAT,
            "version": VERSION,
            "precision": precision,
            "architecture": architecture(config, folder / "config.json"),
            "prefix": prefix,
            "pattern_hash": hashes[0],
            "pooler_hash": hashes[1],
            "sparsity": sizes.pop("sparsity"),
            "activations": _activations(known),
            # Static activations say it already.
            **({"quantized": True} if known is not None and known.input_activations.dynamic else {}),
            "source": digest.hexdigest(),
            "pruneofa": __version__,
            "compression": None,
            "checksum": None,
            "sizes": sizes,
            "tensors": tensors,
        }
    )
    return model


def pack_linear(weight: np.ndarray, precision: str, codes: tuple[np.ndarray, np.ndarray] | None = None) -> PackedLinear:
    """A weight, float32 (rows, columns), packed; the pattern is where it is not zero, whatever int8 rounds to.

    `codes` are int8 codes (rows, columns) and scales (rows,) where they are known; otherwise `quantize_weight` finds
    them.
    """
    kept = weight != 0
    bits = np.packbits(kept, axis=1, bitorder="little")
    if precision == "int8":
        quantized, scale = codes or quantize_weight(weight)
        return PackedLinear(weight.shape, bits, quantized[kept], scale)
    negative = np.packbits(np.signbit(weight) & ~kept, axis=1, bitorder="little")
    return PackedLinear(weight.shape, bits, weight[kept], None, negative if negative.any() else None)


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (rows, columns) and scale float32 (rows,) of a float32 weight, all in float32.

    q = clip(rint(w / s), -127, 127), half to even, with s = max|row| / 127, and 1 for an all-zero row. At the ends
    of what float32 can say, s stays within what neither divides by zero nor gives infinity times 127.
    """
    quantized = np.empty(weight.shape, np.int8)
    scale = np.empty(len(weight), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        largest = np.abs(weight[rows]).max(axis=1)
        scale[rows] = np.clip(largest / np.float32(127), np.float32(2**-149), MAX_SCALE)
        scale[rows][largest == 0] = 1
        quantized[rows] = np.clip(np.rint(weight[rows] / scale[rows, None]), -127, 127)
    return quantized, scale


def _known_codes(
    known: Quantization | None, name: str, weight: np.ndarray, folder: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """int8 codes and scales of a weight that was put on the grid in training; None of any other."""
    if known is None or name not in known.weight_scale:
        return None
    scale = known.weight_scale[name]
    try:
        return quantization.codes(name, weight, scale, known.lowest if kind_of(name, 2) == "linear" else -127), scale
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _activations(known: Quantization | None) -> dict[str, Any]:
    """What the manifest says of activations."""
    if known is None or known.input_activations.dynamic:
        return {"kind": "dynamic"}
    pairs = {name: [float(known.input_scale[name]), int(known.input_zero_point[name])] for name in known.linears()}
    return {"kind": "static", "scales": pairs}


def _quantization(model: Packed) -> Quantization:
    """What a Hugging Face folder says of a packed model whose source brought its scales."""
    activations = model.manifest["activations"]
    static, scales = activations["kind"] == "static", activations.get("scales", {})
    linears = {name: linear.scale for name, linear in model.linears.items() if linear.scale is not None}
    tables = {name: table.scale for name, table in model.embeddings.items() if table.scale is not None}
    # One scale in all rows of every layer is one per tensor, whose codes go to -128.
    shared = all((scale == scale[0]).all() for scale in linears.values())
    return Quantization(
        weights=QuantizationArgs("tensor" if shared else "channel", symmetric=True),
        input_activations=QuantizationArgs("tensor" if static else "token", symmetric=False, dynamic=not static),
        embeddings=QuantizationArgs("channel", symmetric=True) if tables else None,
        weight_scale=linears | tables,
        input_scale={name: scale for name, (scale, _) in scales.items()},
        input_zero_point={name: zero for name, (_, zero) in scales.items()},
        pattern_hash=model.manifest["pattern_hash"],
        pooler_hash=model.manifest["pooler_hash"],
    )


def pattern_of(kept: np.ndarray) -> str:
    """The narrowest pattern of FORMAT.md that the zeros of `kept`, bool (rows, columns), are exactly of."""
    if not kept.any() or kept.all():
        return "unstructured"
    candidates = ["4x1", "1x4"]
    for m in (2, 4, 8, 16):
        if 0 < (n := int(np.count_nonzero(kept[0, :m]))) < m:
            candidates.append(f"{n}:{m}")
    # Four rows first: nearly all that a pattern does not fit are found there.
    return next((p for p in candidates if pattern_holds(kept[:4], p) and pattern_holds(kept, p)), "unstructured")


def _source_tensors(folder: Path) -> dict[str, tuple[str, StoredTensor]]:
    """{canonical name: (name in the source, where it lies)} of every floating-point tensor."""
    found: dict[str, tuple[str, StoredTensor]] = {}
    for file in weight_files(folder):
        for original, stored in tensors_of(file):
            name = canonical_name(original)
            if stored.dtype not in SOURCE_DTYPES:
                if name.split(".")[-1] in _BUFFERS:
                    continue
                wanted = ", ".join(SOURCE_DTYPES)
                raise InputError(f"{file}: {original} has dtype {stored.dtype}; wanted {wanted}: convert the model")
            if 0 in stored.shape:
                raise InputError(f"{file}: {original} has shape {list(stored.shape)}, no number in it; save it again")
            if name in found:
                raise InputError(f"{file}: {original} and {found[name][0]} are both {name}; keep only one of them")
            found[name] = original, stored
    return found


def _prefix(folder: Path, found: Mapping[str, tuple[str, StoredTensor]]) -> str:
    """What stands before the names of the encoder's linears in the source: the prefix of the base model."""
    for name, (original, stored) in sorted(found.items()):
        if name != POOLER and kind_of(name, len(stored.shape)) == "linear":
            return original.removesuffix(name)
    raise InputError(f"{folder}: {families.without_encoder()}")


def _read_float(original: str, stored: StoredTensor) -> np.ndarray:
    """A tensor as float32, which holds every float16 and bfloat16 exactly. Raises InputError for NaN and infinity."""
    weight = read_tensor(original, stored).astype(np.float32, copy=False)
    if not np.isfinite(weight).all():
        count = weight.size - int(np.count_nonzero(np.isfinite(weight)))
        raise InputError(f"{stored.file}: {original} has {count} NaN or infinite; wanted numbers: train again")
    return weight


def _is_tied(
    name: str, stored: StoredTensor, weight: np.ndarray, found: Mapping[str, tuple[str, StoredTensor]]
) -> bool:
    """Whether this is the decoder of a masked-LM head, bit for bit the word embeddings."""
    words_name = families.tied_to(name)
    if words_name not in found:
        return False
    original, words = found[words_name]
    if (stored.dtype, stored.shape) != (words.dtype, words.shape):
        return False
    return np.array_equal(_read_float(original, words).view(np.uint32), weight.view(np.uint32))


def _dense(model: Packed, name: str) -> np.ndarray:
    """A tensor of a packed model as float32."""
    entry = model.manifest["tensors"][name]
    if entry["kind"] == "linear":
        return model.linears[name].dense()
    if entry["kind"] in ("embedding", "tied"):
        return model.embeddings[entry.get("to", name)].rows(slice(None))
    return model.plain[name]


def _narrow(weight: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as the source's dtype, half to even; exact where it came from there."""
    if dtype == "F16":
        return weight.astype("<f2")
    if dtype == "BF16":  # the upper half of a float32
        bits = weight.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return weight


def _write_tensors(packed: Packed, folder: Path, compress: bool) -> dict[str, Any]:
    """Write the tensor file; returns the manifest with what is only known of a file."""
    arrays: dict[str, np.ndarray | None] = dict(packed.plain)
    for name, linear in packed.linears.items():
        arrays |= {f"{name}.bitmask": linear.bitmask, f"{name}.values": linear.values}
        arrays |= {f"{name}.scale": linear.scale, f"{name}.negative_zeros": linear.negative_zeros}
    for name, table in packed.embeddings.items():
        arrays |= {name: table.values, f"{name}.values": table.values, f"{name}.scale": table.scale}
    slots = layout(packed.manifest["tensors"], packed.manifest["precision"])
    head = header(slots, METADATA)
    crc = zlib.crc32(head)
    with open(folder / TENSORS, "wb") as file:
        file.write(head)
        for name in slots:
            data = np.ascontiguousarray(arrays[name]).reshape(-1).data
            file.write(data)
            crc = zlib.crc32(data, crc)
    sizes = {"file": (folder / TENSORS).stat().st_size, **packed.manifest["sizes"]}
    if compress:
        size, encoder = _compress(folder, len(head), slots.values())
        bits = encoder / sizes["encoder"] * sizes["bits_per_weight"]
        sizes |= {"compressed": size, "compressed_encoder": encoder, "compressed_bits_per_weight": bits}
        if sizes["file"] > MAX_RATIO * size + MAX_SLACK:
            raise InputError(
                f"{packed.folder}: shrinks over {MAX_RATIO} times, more than readers allow; do not compress"
            )
    compression = "zstd" if compress else None
    return packed.manifest | {"checksum": f"crc32:{crc:08x}", "compression": compression, "sizes": sizes}


def _compress(folder: Path, head: int, slots: Iterable[Slot]) -> tuple[int, int]:
    """Put one zstd frame in the place of the tensor file; returns its bytes and those of the encoder's weights.

    Two ways are tried and the smaller result stays. With a hash table of 64 entries zstd finds next to no
    repetition and codes every byte by its frequency alone: the best that can be done for bits and values in no
    order, where the chance repetitions that higher levels find cost more than they save. Block patterns do repeat.
    """
    from pruneofa.formats.zstd import CompressionParameter, ZstdCompressor

    kinds = itertools.groupby(slots, key=lambda slot: (slot.dtype, slot.encoder))
    parts = [(head, False), *((sum(slot.nbytes for slot in group), encoder) for (_, encoder), group in kinds)]
    results = []
    key = CompressionParameter
    for way, settings in enumerate(({key.compression_level: 1, key.hash_log: 6}, {key.compression_level: 3})):
        packer = ZstdCompressor(options={**settings, key.checksum_flag: 1})
        packer.set_pledged_input_size(sum(n for n, _ in parts))
        written = {True: 0, False: 0}
        target = folder / f"{way}.zst"
        with open(folder / TENSORS, "rb") as file, open(target, "wb") as out:
            for left, encoder in parts:
                while left:
                    data = file.read(min(left, _CHUNK))
                    left -= len(data)
                    written[encoder] += out.write(packer.compress(data))
                # The block ends here: its table of frequencies is of one kind of bytes, and they can be counted.
                written[encoder] += out.write(packer.flush(packer.FLUSH_BLOCK))
            written[False] += out.write(packer.flush())
        results.append((sum(written.values()), written[True], target))
    (size, encoder, best), (*_, worse) = sorted(results)
    best.replace(folder / COMPRESSED)
    worse.unlink()
    (folder / TENSORS).unlink()
    return size, encoder


@contextlib.contextmanager
def new_output(out: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block succeeds. Raises InputError when `out` holds something."""
    target = Path(out).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; name another one, or remove it first")
    try:
        with new_folder(target) as temporary:
            yield temporary
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{error.filename or out}: {error.strerror}; name a folder that you may write to") from None


def copy_settings(source: Path, target: Path) -> None:
    """Configuration and tokenizer, and what sentence-transformers needs to know how to pool."""
    for name in ("config.json", *_TOKENIZER, *_SENTENCE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (source / _SENTENCE[0]).is_file():
        return
    where = source / _SENTENCE[0]
    modules = read_json(where)
    for module in modules if isinstance(modules, list) else [None]:
        path, kind = (module.get("path"), module.get("type")) if isinstance(module, dict) else (None, None)
        kind = kind.split(".")[-1] if isinstance(kind, str) else None
        # A path of one plain name: no file outside the folder is read or written.
        if not isinstance(path, str) or not re.fullmatch(r"[\w-]*", path, re.ASCII) or kind not in _MODULES:
            wanted = f"a list of modules of type {', '.join(_MODULES)}, each a folder beside it"
            raise InputError(f"{where}: {ascii(module)[:120]}; wanted {wanted}: nothing else can be packed")
        if path and (source / path).is_dir():
            (target / path).mkdir(exist_ok=True)
            if (source / path / "config.json").is_file():
                shutil.copyfile(source / path / "config.json", target / path / "config.json")
