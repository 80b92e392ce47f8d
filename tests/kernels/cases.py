"""Layers, encoders and combinations of sizes for the kernels' tests, the same for the reference and the kernels."""

import itertools
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

X86 = ("scalar", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "amx")
ARM = ("scalar", "neon", "neon_i8mm")  # on other machines: test_arm.py
# Every row of the dispatch table, worst first.
TABLE = ARM if platform.machine() in ("aarch64", "arm64") else X86
# Scales and zero points of what layers of `model` read: norms, attention's mixtures of values, GELU's outputs. As fine
# as those of a token, so that a code counts as little; the largest numbers are clipped.
_NORMED = (0.025, 121)
STATIC = {
    "query": _NORMED, "key": _NORMED, "value": _NORMED, "attention_output": (0.02, 130), "intermediate": (0.024, 126),
    "output": (0.018, 9),
}  # fmt: skip
LINEARS = ("query", "key", "value", "attention_output", "intermediate", "output")


@dataclass(frozen=True)
class Layer:
    """A linear layer as a packed folder has it; `scale` None: float weights."""

    weight: np.ndarray  # (n, k) int8 or float32
    kept: np.ndarray  # (n, k) bool; a kept weight may be 0
    scale: np.ndarray | None
    bias: np.ndarray | None
    input: tuple[float, int] | None = None  # static scale and zero point

    def build(self, module: ModuleType, isa: str) -> Any:
        """`module.Linear`: module is pruneofa.engine.reference or pruneofa._native."""
        bitmask = np.packbits(self.kept, axis=1, bitorder="little")
        arguments = (bitmask, self.weight[self.kept], self.scale, self.bias, self.kept.shape[1], isa)
        return module.Linear(*arguments) if self.input is None else module.Linear(*arguments, self.input)

    def in_floats(self) -> "Layer":
        """The same layer of int8 weights with float weights."""
        return replace(self, weight=(self.weight * self.scale[:, None]).astype(np.float32), scale=None, input=None)


def int8_layer(random: np.random.Generator, n: int, k: int, sparsity: float, fill: str = "random") -> Layer:
    """`fill` says which weights: "random", "high" (127), "low" (-128), "extremes" (-128, 0 and 127),
    "empty rows" (every second one), "full rows" (every second one), "last column"; or which pattern: "4x1" (4 outputs
    of one input share their fate), "1x4" (4 inputs of one output do); blocks at the edges are cut off."""
    rows, columns = {"4x1": (4, 1), "1x4": (1, 4)}.get(fill, (1, 1))
    blocks = random.random((-(-n // rows), -(-k // columns))) >= sparsity
    kept = blocks.repeat(rows, axis=0).repeat(columns, axis=1)[:n, :k]
    weight = random.integers(-128, 128, (n, k)).astype(np.int8)
    if fill == "high":
        weight[:] = 127
    elif fill == "low":
        weight[:] = -128
    elif fill == "extremes":
        weight = random.choice(np.array([-128, 0, 127], np.int8), (n, k))
    elif fill == "empty rows":
        kept[::2] = False
    elif fill == "full rows":
        kept[::2] = True
    elif fill == "last column":
        kept[:] = False
        kept[:, -1] = True
    scale = (random.random(n) + 0.5).astype(np.float32) / 127
    return Layer(np.where(kept, weight, 0).astype(np.int8), kept, scale, random.normal(size=n).astype(np.float32))


def float_layer(random: np.random.Generator, n: int, k: int, sparsity: float) -> Layer:
    kept = random.random((n, k)) >= sparsity
    weight = (random.normal(size=(n, k)) * kept).astype(np.float32)
    return Layer(weight, kept, None, random.normal(size=n).astype(np.float32))


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one element per axis in which every two elements of different axes meet. Greedy, repeatable."""
    random = np.random.default_rng(0)
    pairs = list(itertools.combinations(range(len(axes)), 2))
    missing = {(a, i, b, j) for a, b in pairs for i in range(len(axes[a])) for j in range(len(axes[b]))}
    rows = []
    while missing:
        a, i, b, j = min(missing)
        best: tuple[int, list[int]] = (-1, [])
        for _ in range(20):
            row = [int(random.integers(len(axis))) for axis in axes]
            row[a], row[b] = i, j
            best = max(best, (sum((c, row[c], d, row[d]) in missing for c, d in pairs), row))
        row = best[1]
        missing -= {(c, row[c], d, row[d]) for c, d in pairs}
        rows.append(tuple(axis[index] for axis, index in zip(axes, row, strict=True)))
    return rows


@dataclass(frozen=True)
class Model:
    """The parts of an encoder with random weights."""

    hidden: int
    heads: int
    activation: str
    tables: dict[str, Any]
    embedding_norm: tuple[np.ndarray, np.ndarray]
    layers: list[dict[str, Any]]
    relative_bias: np.ndarray | None = None

    def build(self, module: ModuleType, isa: str, threads: int = 1) -> Any:
        """`module.Encoder`; the reference takes "scalar" only."""
        layers = [
            {name: part.build(module, isa) if isinstance(part, Layer) else part for name, part in layer.items()}
            for layer in self.layers
        ]
        return module.Encoder(
            hidden=self.hidden, heads=self.heads, epsilon=1e-12, activation=self.activation, threads=threads, isa=isa,
            embedding_norm=self.embedding_norm, layers=layers, relative_bias=self.relative_bias, **self.tables,
        )  # fmt: skip

    def in_floats(self) -> "Model":
        """The same model of int8 weights with float weights, so that activations are not quantized."""
        return replace(self, layers=[
            {name: part.in_floats() if isinstance(part, Layer) else part for name, part in layer.items()}
            for layer in self.layers
        ])  # fmt: skip


def model(
    *, hidden: int = 64, heads: int = 4, inner: int = 128, depth: int = 2, precision: str = "int8",
    sparsity: float = 0.4, activation: str = "gelu", words: int = 50, positions: int = 96, types: int = 2,
    seed: int = 0,
) -> Model:  # fmt: skip
    """Weights of the size that trained ones have: outputs of a linear layer vary about as much as its inputs.

    `precision` is "fp32", "int8" (activations by the token) or "static" (int8 with the scales of `STATIC`).
    """
    static, precision = precision == "static", "int8" if precision == "static" else precision
    random = np.random.default_rng(seed)

    def table(rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        if precision == "int8":
            scale = (random.random(rows) + 0.5).astype(np.float32) / 127
            return random.integers(-127, 128, (rows, hidden)).astype(np.int8), scale
        return random.normal(size=(rows, hidden)).astype(np.float32), None

    def norm() -> tuple[np.ndarray, np.ndarray]:
        return random.uniform(0.5, 1.5, hidden).astype(np.float32), random.normal(0, 0.1, hidden).astype(np.float32)

    def linear(n: int, k: int) -> Layer:
        size = np.float32(1 / np.sqrt(max(k * (1 - sparsity), 1)))
        if precision == "int8":
            layer = int8_layer(random, n, k, sparsity)
            return Layer(layer.weight, layer.kept, layer.scale * 2 * size, layer.bias * np.float32(0.1))
        layer = float_layer(random, n, k, sparsity)
        return Layer(layer.weight * size, layer.kept, None, layer.bias * np.float32(0.1))

    shapes = dict.fromkeys(LINEARS[:4], (hidden, hidden)) | {"intermediate": (inner, hidden), "output": (hidden, inner)}
    layers = [
        {name: replace(linear(*shape), input=STATIC[name] if static else None) for name, shape in shapes.items()}
        | {"attention_norm": norm(), "output_norm": norm()}
        for _ in range(depth)
    ]
    tables = {"word": table(words), "position": table(positions), "token_type": table(types) if types else None}
    return Model(hidden, heads, activation, tables, norm(), layers)


def batch(lengths: Sequence[int], *, words: int = 50, types: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    """ids, positions, types and offsets of sequences end to end."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    ids = random.integers(0, words, tokens).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    kinds = random.integers(0, max(types, 1), tokens).astype(np.int32)
    return ids, positions, kinds, np.cumsum([0, *lengths]).astype(np.int32)


def one_by_one(inputs: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, ...]]:
    """The sequences of a batch, each as a batch of its own."""
    *parts, offsets = inputs
    return [
        (*(part[begin:end].copy() for part in parts), np.array([0, end - begin], np.int32))
        for begin, end in itertools.pairwise(offsets)
    ]
