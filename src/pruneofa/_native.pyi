"""Sparse int8 and float kernels, and the encoder made of them. `pruneofa.engine.reference` defines what each computes.

Arrays must be C-contiguous NumPy arrays of the stated dtype, which are not converted; anything else raises TypeError.
The GIL is released while kernels run. Built from native/; docs/kernels.md describes how it works.
"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Table = tuple[NDArray[np.int8], Floats] | tuple[Floats, None]  # rows of an embedding: int8 and a scale each, or float32

def built_isas() -> list[str]:
    """Paths of this build, slowest first; a subset of "scalar", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "amx",
    "neon" and "neon_i8mm"."""

def available_isas() -> list[str]:
    """The built paths that this CPU and operating system can run, slowest first."""

def arithmetic_peak(isa: str, int8: bool, threads: int) -> float:
    """Operations per second that `threads` threads reach now with the products of a path, int8 or else float32.

    A multiplication and an addition are two operations. Operands stay in registers and the first-level cache. The best
    of some slots of a millisecond. Raises ValueError for an unknown isa, or threads that are not 1 to 4096.
    """

def read_bandwidth(isa: str, bytes: int, threads: int) -> float:
    """Bytes per second that `threads` threads together read now, each `bytes` of its own, over and over.

    The best of some slots of a millisecond or more. Raises ValueError as above, and for bytes that are not 1 to 2^40;
    MemoryError where there is not enough.
    """

class Linear:
    """y = x W^T + b with a sparse W, laid out for one path at construction and immutable from then on.

    Several threads may use it at once.
    """

    @overload
    def __init__(
        self,
        bitmask: NDArray[np.uint8],
        values: NDArray[np.int8],
        scale: Floats,
        bias: Floats | None,
        k: int,
        isa: str,
        input: tuple[float, int] | None = None,
    ) -> None:
        """int8 weights.

        Args:
            bitmask: (n, ceil(k / 8)) uint8, little-endian bits, 1 = kept; spare bits 0.
            values: (nonzeros,) int8, the kept weights row by row.
            scale: (n,) float32, finite and above 0.
            bias: (n,) float32 or None.
            k: number of inputs, 1 to 65535.
            isa: one of `available_isas()`.
            input: static (scale, zero point) of the input of `forward`; None: computed for each row.

        Raises:
            ValueError: sizes that do not fit together, a scale or zero point out of range, an unknown isa.
            TypeError: an array of another type, number of dimensions or memory order.
        """

    @overload
    def __init__(
        self, bitmask: NDArray[np.uint8], values: Floats, scale: None, bias: Floats | None, k: int, isa: str
    ) -> None:
        """Float weights: `values` (nonzeros,) float32 and no scale; the rest as for int8."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k): outputs and inputs."""

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are not kept, 0 to 1."""

    @property
    def choice(self) -> str:
        """The layout in memory and why: "sparse: ..." or "dense: ..."."""

    def accumulate(self, x: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Integer sums x W^T of int8 weights: (m, k) uint8 to (m, n) int32, the same on every path.

        No zero point is subtracted and no bias added. Raises ValueError for float weights or another number of
        columns, TypeError for another type.
        """

    def forward(self, x: Floats) -> Floats:
        """(m, k) float32 to (m, n) float32; for int8 weights x is quantized, row by row or by the static input.

        Raises ValueError for another number of columns, TypeError for another type.
        """

class Pattern:
    """Products with a weight of which only the entries of a fixed pattern are not zero, for training in float32.

    The weight, (n, k), is read in every call. Arrays that results are written to must be C-contiguous too and overlap
    no other argument. Results do not depend on `threads`; with several, a calling thread keeps some of its own.
    Immutable: threads may use it at the same time. All methods raise ValueError for sizes that do not fit together, and
    TypeError for an array of another type, number of dimensions or memory order.
    """

    def __init__(self, kept: NDArray[np.bool_], isa: str) -> None:
        """kept: (n, k), True where a weight is kept, n and k up to 65535; isa: one of `available_isas()`.

        Raises ValueError for another size and an unknown isa.
        """

    def multiply(self, x: Floats, weight: Floats, bias: Floats | None, y: Floats, threads: int) -> None:
        """y = x W^T + bias: x (m, k), bias (n,), y (m, n)."""

    def multiply_transposed(self, dy: Floats, weight: Floats, dx: Floats, threads: int) -> None:
        """dx = dy W: dy (m, n), dx (m, k)."""

    def weight_gradient(self, x: Floats, dy: Floats, dw: Floats, threads: int) -> None:
        """dw = dy^T x at the kept weights, and +0.0 elsewhere: x (m, k), dy (m, n), dw (n, k)."""

class Encoder:
    """Embeddings and transformer layers: attention and feed-forward blocks, LayerNorm after each.

    It has `threads` - 1 threads of its own, and buffers for every group of them. Python threads may call it at the same
    time and share its threads evenly. A process that is forked off starts its own at the first call.
    """

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        epsilon: float,
        activation: str,
        threads: int,
        isa: str,
        word: Table,
        position: Table,
        token_type: Table | None,
        embedding_norm: tuple[Floats, Floats],
        layers: Sequence[Mapping[str, Any]],
        relative_bias: Floats | None = None,
    ) -> None:
        """Copy norms and scales; keep references to the layers and to the rows of the tables, which must not change.

        Args:
            hidden: size of a token's vector, divisible by `heads`.
            heads: attention heads.
            epsilon: epsilon of every LayerNorm.
            activation: "gelu" (by the error function), "gelu_new" or "gelu_pytorch_tanh" (by tanh), "relu".
            threads: number of threads including the calling one, 1 to 4096.
            isa: one of `available_isas()`, the same as that of all layers.
            word: table of the word embeddings, rows (v, hidden).
            position: table of the position embeddings.
            token_type: table of the token-type embeddings, None without one.
            embedding_norm: gamma and beta, (hidden,) float32.
            layers: dicts of the Linears "query", "key", "value", "attention_output", "intermediate" and "output", and
                of (gamma, beta) as "attention_norm" and "output_norm".
            relative_bias: (heads, 2 l - 1) float32, finite: what attention adds to the scaled score of a query and a
                key, in column l - 1 + query - key; no sequence may be longer than l. None: nothing is added.

        Raises:
            ValueError: sizes, precisions, static inputs or paths do not match, or a setting is out of range.
            KeyError: a layer lacks an entry.
            TypeError: an argument has another type.
        """

    def forward(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        types: NDArray[np.int32],
        offsets: NDArray[np.int32],
        parts: NDArray[np.int32] | None = None,
        lanes: int = 1,
        width: int | None = None,
    ) -> Floats:
        """Hidden states (t, hidden) of the last layer for concatenated sequences, without padding.

        Results are bit-identical for the same path, whatever else is in the batch and however it is divided. The ids
        and the other arguments are copied first: changing them meanwhile changes nothing.

        Args:
            ids: (t,) int32, rows of `word`.
            positions: (t,) int32, rows of `position`.
            types: (t,) int32, rows of `token_type`.
            offsets: (s + 1,) int32, start of each of the s sequences, and t.
            parts: (p + 1,) int32: the sequences parts[i] to parts[i + 1] - 1 are computed together; None: all are.
                After a quarter of a second no further part is begun: the result then ends with the last one that was,
                and the caller calls again for the others.
            lanes: the most groups of threads that compute parts at the same time.
            width: the most threads of a lane; None: threads / lanes.

        Raises:
            ValueError: an id, position or type outside of its table; offsets that do not rise from 0 to t, or parts
                from 0 to s; a sequence longer than `relative_bias` has distances for; lanes or width that the threads
                are too few for.
            TypeError: an array of another type.
        """

    @property
    def barriers(self) -> int:
        """How often the threads of a lane meet in a pass: 1 + 10 times a layer with dynamic scales, otherwise 1 + 6."""

    def choices(self) -> list[tuple[str, str]]:
        """("layer.0.query", choice) and so on: `Linear.choice` of every linear layer."""
