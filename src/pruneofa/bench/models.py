"""What `pruneofa bench` measures: its settings, the models, and batches of random tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa.bench.peers import PRUNEOFA
from pruneofa.bench.random_folder import check_random, write_random
from pruneofa.errors import InputError
from pruneofa.formats.architecture import Architecture, read_architecture
from pruneofa.formats.manifest import Manifest, Tensor, is_packed, read_config
from pruneofa.formats.manifest_reader import read_manifest
from pruneofa.formats.pack import pack
from pruneofa.formats.tensors import weights_folder
from pruneofa.formats.unpack import unpack

DEFAULT_SEQ = (32, 128, 384)
DEFAULT_MIXED = "32x8-128"
_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What to measure; the command line's options.

    Attributes:
        path: folder or hub id; None with `random`, one of `families.shapes()`.
        also: further models, measured with pruneofa only: a path or, with `random`, PATTERN@SPARSITY such as "4x1@0.8".
        mixed: batches of different lengths, "32x8-128": 32 sequences of 8 to 128 tokens.
        isa: the highest ISA that pruneofa and the peers may use; None: no limit.
        peers: names to compare with; None: all that are installed.
        pythons: {peer: interpreter that has it}.
        work: folder that keeps the exported models for the next run; None: a temporary one.
        limit: seconds that a step of a peer (its export, or its runs of a round) may take before it is left out.
        peak: peak of the machine, 10^12 operations per second, of which a share is reported; None: what is measured.
    """

    path: str | None = None
    random: str | None = None
    sparsity: float = 0.9
    pattern: str = "unstructured"
    also: tuple[str, ...] = ()
    seq: tuple[int, ...] = ()
    batch: int = 1
    mixed: tuple[str, ...] = ()
    threads: int | None = None
    isa: str | None = None
    precision: str = "int8"
    peers: tuple[str, ...] | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)
    repeats: int = 30
    work: Path | None = None
    limit: float = 600
    peak: float | None = None


@dataclass(frozen=True)
class Case:
    """One batch, given by the number of tokens of each sequence."""

    name: str
    lengths: tuple[int, ...]

    def inputs(self, vocabulary: int, pad: int) -> dict[str, NDArray[np.int64]]:
        """Random token ids (batch, longest) and, where lengths differ, the mask; the same in every run."""
        low = vocabulary // 10  # above the special tokens
        ids = np.random.default_rng(_SEED).integers(low, vocabulary, (len(self.lengths), max(self.lengths)))
        if len(set(self.lengths)) == 1:
            return {"input_ids": ids}
        mask = (np.arange(max(self.lengths)) < np.array(self.lengths)[:, None]).astype(np.int64)
        return {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask}


@dataclass(frozen=True)
class Model:
    """One set of weights: its Hugging Face folder, its packed folder, and the manifest."""

    label: str
    folder: Path
    packed: Path
    manifest: Manifest

    @property
    def linears(self) -> list[Tensor]:
        """The encoder's linear weights."""
        return list(self.manifest.linears.values())

    def rows(self, table: str) -> int:
        """Rows of an embedding table, "word" or "position"."""
        return self.manifest.tensors[self.architecture.tables[table]].shape[0]

    def operations(self, case: Case) -> int:
        """Multiplications and additions that a dense encoder needs, padding not counted: linears and attention."""
        weights = sum(tensor.size for tensor in self.linears)
        attention = sum(2 * n * n for n in case.lengths) * self.hidden * (len(self.linears) // 6)
        return 2 * (sum(case.lengths) * weights + attention)

    @property
    def hidden(self) -> int:
        """Width of the encoder."""
        return self.architecture.hidden

    @cached_property
    def architecture(self) -> Architecture:
        """The checked settings of config.json."""
        return read_architecture(read_config(self.folder), self.folder)


def describe(model: Model) -> dict[str, Any]:
    """The description of a model in a record."""
    kept = {name: getattr(model.manifest, name) for name in ("architecture", "sparsity", "pattern_hash", "precision")}
    patterns = sorted({str(tensor.pattern) for tensor in model.linears})
    family = model.architecture.family.model_type
    sizes = {"layers": len(model.linears) // 6, "hidden": model.hidden}
    return {"name": model.label, "family": family, **kept, "patterns": patterns, **sizes}


def read_models(settings: Settings, root: Path) -> Iterator[Model]:
    """The models to measure, each as a Hugging Face folder and packed. Raises InputError."""
    if (settings.path is None) == (settings.random is None):
        raise InputError("wanted exactly one model; give PATH, or --random SHAPE")
    specs = [settings.path or f"{settings.pattern}@{settings.sparsity:g}", *settings.also]
    if settings.random is not None:
        for spec in specs:
            check_random(settings.random, *_zeros(spec))
    for index, spec in enumerate(specs):
        label = PRUNEOFA if index == 0 else f"{PRUNEOFA} {index + 1}: {Path(spec).name}"
        here = root / f"model-{index}"
        folder = here / "folder"
        if settings.random is not None:
            write_random(folder, settings.random, *_zeros(spec))
        else:
            folder = weights_folder(spec)
        if is_packed(folder):
            manifest = read_manifest(folder)
            if settings.precision == "fp32" and manifest.precision == "int8":
                raise InputError(
                    f"{spec}: packed as int8, but --precision fp32 was requested; give the original folder"
                )
            unpack(folder, here / "unpacked")
            yield Model(label, here / "unpacked", folder, manifest)
        else:
            yield Model(label, folder, here / "packed", pack(folder, here / "packed", precision=settings.precision))


def _zeros(spec: str) -> tuple[float, str]:
    """Sparsity and pattern of PATTERN@SPARSITY."""
    pattern, _, number = spec.partition("@")
    try:
        return float(number), pattern
    except ValueError:
        raise InputError(f"--also {spec}: wanted PATTERN@SPARSITY, such as 4x1@0.8, with --random") from None


def read_cases(settings: Settings, model: Model) -> list[Case]:
    """The batches to measure. Raises InputError for a malformed batch or one that is too long for the model."""
    most = model.rows("position") - model.architecture.first_position
    if settings.batch < 1:
        raise InputError(f"batch is {settings.batch}, wanted at least 1")
    seq = settings.seq or (() if settings.mixed else tuple(n for n in DEFAULT_SEQ if n <= most) or (most,))
    cases = [Case(f"{settings.batch}x{length}", (length,) * settings.batch) for length in seq]
    for spec in settings.mixed:
        count, _, lengths = spec.partition("x")
        low, _, high = lengths.partition("-")
        if not (count.isdigit() and low.isdigit() and high.isdigit() and 0 < int(low) <= int(high) and int(count)):
            raise InputError(f"--mixed {spec}: wanted COUNTxSHORTEST-LONGEST, such as 32x8-128")
        drawn = np.random.default_rng(_SEED).integers(int(low), int(high) + 1, int(count))
        cases.append(Case(spec, tuple(map(int, drawn))))
    for case in cases:
        if not 1 <= min(case.lengths) <= max(case.lengths) <= most:
            raise InputError(
                f"{case.name}: {max(case.lengths)} tokens, but the model takes 1 to {most}; change --seq or --mixed"
            )
    return cases
