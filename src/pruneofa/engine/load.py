"""From the packed weights of a model to the encoder of the native extension."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pruneofa.errors import InputError
from pruneofa.formats.architecture import Architecture
from pruneofa.formats.packed import Packed, PackedEmbedding

Precision = Literal["int8", "fp32"]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Dense:
    """A float32 linear layer of a head: weight (outputs, inputs) and bias (outputs,)."""

    weight: Float
    bias: Float

    def __call__(self, x: Float) -> Float:
        """(rows, inputs) to (rows, outputs). Raises InputError as `finite` does."""
        return finite(x @ self.weight.T + self.bias)


def finite(values: Float) -> Float:
    """The values. Raises InputError if one is NaN or infinite: every weight is finite, but products can overflow."""
    if not np.isfinite(values).all():
        raise InputError(
            "the model computes NaN or infinity for this input, wanted finite numbers: its weights are too large for "
            "float32; train it again with a lower lr"
        )
    return values


class Weights:
    """The tensors of a packed model by canonical name; `check_tensors` has checked that all exist and fit.

    A linear layer is removed from the packed model as soon as the kernels have their own copy, which halves the peak
    memory.
    """

    def __init__(self, packed: Packed, native: Any, isa: str) -> None:
        self._packed, self._native, self._isa = packed, native, isa
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

    def dense(self, module: str) -> Dense:
        """A linear layer that NumPy computes, in float32."""
        return Dense(self.plain(f"{module}.weight"), self.plain(f"{module}.bias"))

    def table(self, name: str) -> PackedEmbedding:
        """An embedding table."""
        return self._packed.embeddings[name]

    def linear(self, module: str) -> Any:
        """`native.Linear` of a sparse linear layer and its bias; each layer can be requested only once.

        Raises:
            InputError: it is too large for the kernels.
        """
        name = f"{module}.weight"
        weight, bias = self._packed.linears.pop(name), self.plain(f"{module}.bias")
        static = self._static.get(name)
        arguments = (weight.bitmask, weight.values, weight.scale, bias, weight.shape[1], self._isa)
        try:
            return self._native.Linear(*arguments) if static is None else self._native.Linear(*arguments, static)
        except ValueError as error:  # the kernels take fewer inputs than the format has columns
            raise InputError(f"{self._packed.folder}: {name}: {error}; use a narrower model") from None


def build_encoder(native: Any, weights: Weights, architecture: Architecture, *, threads: int, isa: str) -> Any:
    """`native.Encoder` of a packed model. Raises InputError for a layer that is too large for the kernels."""
    layers = [
        {
            field: weights.norm(module) if field.endswith("_norm") else weights.linear(module)
            for field, module in architecture.layer(index).items()
        }
        for index in range(architecture.layers)
    ]
    tables = {name: weights.table(weight) for name, weight in architecture.tables.items()}
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
        embedding_norm=weights.norm(architecture.family.embedding_norm),
        layers=layers,
    )
