"""From the packed weights of a model to the encoder of the native extension."""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine import bounds
from pruneofa.errors import InputError
from pruneofa.families import RelativeBias
from pruneofa.formats.architecture import Architecture
from pruneofa.formats.convert import pack_linear
from pruneofa.formats.manifest import MAX_COLUMNS
from pruneofa.formats.packed import Packed, PackedEmbedding, PackedLinear

Precision = Literal["int8", "fp32"]
Float = NDArray[np.float32]


class Weights:
    """The tensors of a packed model by canonical name; `check_tensors` has checked that all exist and fit.

    A linear layer is removed from the packed model as soon as the kernels have their own copy, which halves the peak
    memory.
    """

    def __init__(self, packed: Packed, native: Any, isa: str) -> None:
        self._packed, self._native, self._isa = packed, native, isa
        self.folder = packed.folder  # which errors name
        self._static = packed.input_scales or {}

    def __contains__(self, name: str) -> bool:
        """Whether there is a plain tensor of this name."""
        return name in self._packed.plain

    def plain(self, name: str) -> Float:
        """A tensor that is stored as it is, float32."""
        return np.ascontiguousarray(self._packed.plain[name], np.float32)

    def norm(self, module: str) -> tuple[Float, Float]:
        """Gamma and beta of a LayerNorm, (hidden,) each."""
        return self.plain(f"{module}.weight"), self.plain(f"{module}.bias")

    def dense(self, module: str) -> Any:
        """`native.Linear` in float32 of a layer of a head: unlike a product of NumPy, whose sums depend on the number
        of rows, it gives a row the same result in any batch. Raises InputError as `linear`.
        """
        return self._linear(module, pack_linear(self.plain(f"{module}.weight"), "fp32"))

    def table(self, name: str) -> PackedEmbedding:
        """An embedding table."""
        return self._packed.embeddings[name]

    def packed_linear(self, module: str) -> bounds.Linear:
        """The weight and bias of a linear layer that was not requested yet."""
        return self._packed.linears[f"{module}.weight"], self.plain(f"{module}.bias")

    def linear(self, module: str) -> Any:
        """`native.Linear` of a sparse linear layer and its bias; each layer can be requested only once.

        Raises:
            InputError: it is too large for the kernels.
        """
        return self._linear(module, self._packed.linears.pop(f"{module}.weight"))

    def _linear(self, module: str, weight: PackedLinear) -> Any:
        name, bias = f"{module}.weight", self.plain(f"{module}.bias")
        static = self._static.get(name)
        arguments = (weight.bitmask, weight.values, weight.scale, bias, weight.shape[1], self._isa)
        if weight.shape[1] > MAX_COLUMNS:  # a folder that is not packed may have any number
            raise InputError(
                f"{self.folder}: {name}: {weight.shape[1]} inputs, wanted at most {MAX_COLUMNS}; use a narrower model"
            )
        return self._native.Linear(*arguments) if static is None else self._native.Linear(*arguments, static)


def bias_by_distance(table: Float, bias: RelativeBias, length: int) -> Float:
    """The bias of attention by distance (heads, 2 · length - 1), in column length - 1 + query - key.

    Args:
        table: (buckets, heads) float32.
        bias: says which distances share a bucket.
        length: maximum number of tokens of a sequence.
    """
    distances = np.arange(1 - length, length)
    half = bias.buckets // 2
    own = half // 2  # distances with a bucket of their own
    far = np.maximum(np.abs(distances), own)
    # In float32, as in transformers, because a power of two is at the limit of a bucket.
    shared = np.log(far.astype(np.float32) / np.float32(own)) / np.float32(math.log(bias.max_distance / own))
    buckets = np.minimum(own + (shared * np.float32(half - own)).astype(np.int64), half - 1)
    buckets = np.where(np.abs(distances) < own, np.abs(distances), buckets) + half * (distances < 0)
    return np.ascontiguousarray(table[buckets].T)


def build_encoder(native: Any, weights: Weights, architecture: Architecture, *, threads: int, isa: str) -> Any:
    """`native.Encoder` of a packed model. Raises InputError for a layer that is too large for the kernels."""
    tables = {name: weights.table(weight) for name, weight in architecture.tables.items()}
    bounds.check_embeddings(tables.values(), f"{weights.folder}: embeddings")
    embedding_norm = weights.norm(architecture.family.embedding_norm)
    layers, inputs = [], bounds.sum_after_norm(embedding_norm)
    for index in range(architecture.layers):
        modules = architecture.layer(index)
        norms = {field: weights.norm(module) for field, module in modules.items() if field.endswith("_norm")}
        linears = {field: module for field, module in modules.items() if field not in norms}
        packed = {field: weights.packed_linear(module) for field, module in linears.items()}
        inputs = bounds.check_layer(packed, norms, inputs, f"{weights.folder}: {architecture.family.layers}.{index}")
        layers.append(norms | {field: weights.linear(module) for field, module in linears.items()})
    bias = architecture.family.relative_bias
    length = max(len(tables["position"].values) - architecture.first_position, 1)
    native_tables = {name: (table.values, table.scale) for name, table in tables.items()}
    return native.Encoder(
        hidden=architecture.hidden,
        heads=architecture.heads,
        epsilon=architecture.epsilon,
        activation=architecture.activation,
        threads=threads,
        isa=isa,
        word=native_tables["word"],
        position=native_tables["position"],
        token_type=native_tables.get("token_type"),
        embedding_norm=embedding_norm,
        layers=layers,
        relative_bias=bias and bias_by_distance(weights.plain(f"{bias.table}.weight"), bias, length),
    )
