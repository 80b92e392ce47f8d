"""NumPy reference implementation of every operation of inference, with the names and signatures of the native ones.

Hidden states of t tokens are a (t, hidden) float32 matrix. Several sequences are concatenated in it without padding;
`offsets` (s + 1,) gives the start of each. A Linear of n outputs and k inputs has an (n, k) weight.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Table = tuple[np.ndarray, Float | None]  # rows of an embedding: int8 and a scale per row, or float32 and None

MAX_INPUTS = 2**16 - 1  # 255 * 128 * 2**16 < 2**31: an int32 accumulator cannot overflow; groups have 16 bits


def available_isas() -> list[str]:
    """Instruction sets that this module can use, slowest first: only NumPy's own."""
    return ["scalar"]


def quantize_rows(x: Float) -> tuple[NDArray[np.uint8], Float, NDArray[np.int32]]:
    """Quantize each row to uint8 over its own range, extended to include 0.

    x = scale * (q - zero_point) up to rounding; all steps in float32, rounding half to even.

    Args:
        x: (m, k) float32.

    Returns:
        q (m, k) uint8, scale (m,) float32 and zero_point (m,) int32. A row of zeros has scale 1, as has one whose
        scale would be below 2^-126, of which float32 has no reciprocal.
    """
    low = np.minimum(x.min(axis=1), np.float32(0))
    high = np.maximum(x.max(axis=1), np.float32(0))
    scale = (high - low) / np.float32(255)
    scale[scale < np.finfo(np.float32).tiny] = 1
    zero_point = np.rint(-low / scale).astype(np.int32)
    return quantize(x, scale[:, None], zero_point[:, None]), scale, zero_point


def quantize(x: Float, scale: Float | np.float32, zero_point: NDArray[np.int32] | int) -> NDArray[np.uint8]:
    """Codes clip(rint(x / scale) + zero_point, 0, 255) of (m, k) float32, in float32, rounding half to even.

    `scale` and `zero_point` are (m, 1), or one number where they are static.
    """
    return np.clip(np.rint(x / scale) + np.float32(zero_point), 0, 255).astype(np.uint8)


def layer_norm(x: Float, gamma: Float, beta: Float, epsilon: float) -> Float:
    """Normalize each row of (t, hidden) to mean 0 and variance 1, then scale by `gamma` and shift by `beta`."""
    centered = x - x.mean(axis=1, keepdims=True)
    variance = np.square(centered).mean(axis=1, keepdims=True)  # over n, not n - 1
    return centered / np.sqrt(variance + np.float32(epsilon)) * gamma + beta


def gelu(x: Float) -> Float:
    """x times the probability that a standard normal variable is below x, by the error function."""
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return np.float32(0.5) * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


def gelu_tanh(x: Float) -> Float:
    """The approximation of `gelu` by a hyperbolic tangent that GPT-2 introduced."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def relu(x: Float) -> Float:
    """The greater of x and 0."""
    return np.maximum(x, np.float32(0))


ACTIVATIONS: Mapping[str, Callable[[Float], Float]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
}


def sigmoid(x: NDArray[Any]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) of each number, in float64."""
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def softmax(x: NDArray[Any]) -> NDArray[Any]:
    """Exponentials of the last axis, (..., n), by their sum; the greatest is subtracted first against overflow."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of the last axis, (..., n), at length 1. In float32 the sum of squares could overflow, and give zeros."""
    squares = np.vecdot(x, x, dtype=np.float64)[..., None]
    return (x / np.sqrt(np.maximum(squares, 1e-24))).astype(np.float32)


def attention(
    query: Float, key: Float, value: Float, heads: int, offsets: NDArray[np.int32], bias: Float | None = None
) -> Float:
    """Multi-head attention of every token to all tokens of its own sequence.

    Args:
        query: (t, hidden), as `key` and `value`. Each head has hidden / heads consecutive columns.
        offsets: (s + 1,) start of each sequence, and t.
        bias: (heads, 2 l - 1), added to scaled scores, in column l - 1 + query - key; None: nothing is.

    Returns:
        (t, hidden)
    """
    size = query.shape[1] // heads
    result = np.empty_like(query)
    for begin, end in itertools.pairwise(offsets):
        tokens = np.arange(end - begin)
        distances = tokens[:, None] - tokens
        for head in range(heads):
            rows, columns = slice(begin, end), slice(head * size, (head + 1) * size)
            scores = query[rows, columns] @ key[rows, columns].T * np.float32(1 / math.sqrt(size))  # (l, l)
            if bias is not None:
                scores = scores + bias[head, bias.shape[1] // 2 + distances]
            result[rows, columns] = softmax(scores) @ value[rows, columns]
    return result


def embedding_rows(table: Table, ids: NDArray[np.int32]) -> Float:
    """Rows `ids` (t,) of a table as float32 (t, hidden). Raises ValueError for an id outside of the table."""
    values, scale = table
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(values):
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, but the table has rows 0 to {len(values) - 1}")
    rows = values[ids].astype(np.float32)
    return rows if scale is None else rows * scale[ids][:, None]


class Linear:
    """y = x W^T + b with a sparse W: int8 with a scale per row, or float32 (`scale` None)."""

    def __init__(
        self,
        bitmask: NDArray[np.uint8],
        values: np.ndarray,
        scale: Float | None,
        bias: Float | None,
        k: int,
        isa: str,
        input: tuple[float, int] | None = None,
    ) -> None:
        """Set the weight from the arrays of a packed folder.

        Args:
            bitmask: (n, ceil(k / 8)), little-endian bits, 1 = kept.
            values: (nonzeros,) the kept weights row by row, int8 or float32.
            scale: float32 (n,) for int8 values, None for float32 values.
            bias: (n,) or None.
            k: number of inputs.
            isa: one of `available_isas()`.
            input: static (scale, zero point) of the input, for int8 values; None: computed for each row.

        Raises:
            ValueError: an unknown isa, too many inputs, sizes that do not fit together, or an input out of range.
        """
        if isa not in available_isas():
            raise ValueError(f"isa is {isa!r}, wanted one of {', '.join(available_isas())}")
        if not 1 <= k <= MAX_INPUTS or bitmask.shape[1] != math.ceil(k / 8):
            raise ValueError(f"{k} inputs and a bitmask of {bitmask.shape[1]} bytes per row; wanted 1 to {MAX_INPUTS}")
        if (scale is None) != (values.dtype == np.float32):
            raise ValueError(f"{values.dtype} values {'without' if scale is None else 'with'} a scale")
        if input is not None and not (scale is not None and 2.0**-126 <= input[0] <= 2.0**119 and 0 <= input[1] <= 255):
            raise ValueError(f"input is {input}; wanted (scale, zero point) of an int8 weight")
        kept = np.unpackbits(bitmask, axis=1, count=k, bitorder="little").astype(bool)
        if np.count_nonzero(kept) != len(values):
            raise ValueError(f"{len(values)} values for {np.count_nonzero(kept)} kept weights")
        self._weight = np.zeros(kept.shape, values.dtype)
        self._weight[kept] = values
        self._scale, self._bias, self._input = scale, bias, input
        self.shape = (len(bitmask), k)
        self.sparsity = 1 - len(values) / kept.size
        self.choice = "dense: the reference multiplies by the zeros too"

    def accumulate(self, x: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Integer sums x W^T: (m, k) uint8 to (m, n) int32, exact; no zero point, no bias.

        Raises ValueError for a float32 weight.
        """
        if self._scale is None:
            raise ValueError("a float32 Linear has no integer sums; use forward")
        # float64 holds every sum exactly (they are below 2**53) and, unlike integers, has a fast product
        return (x.astype(np.float64) @ self._weight.T.astype(np.float64)).astype(np.int32)

    def forward(self, x: Float) -> Float:
        """(m, k) float32 to (m, n) float32. For an int8 weight x is quantized, per row or with the static scale."""
        if self._scale is None:
            y = x @ self._weight.T
        else:
            if self._input is None:
                q, scale, zero_point = quantize_rows(x)
            else:
                scale = np.full(len(x), self._input[0], np.float32)
                zero_point = np.full(len(x), self._input[1], np.int32)
                q = quantize(x, scale[:, None], zero_point[:, None])
            row_sums = self._weight.sum(axis=1, dtype=np.int32)
            sums = self.accumulate(q) - zero_point[:, None] * row_sums
            y = sums.astype(np.float32) * (scale[:, None] * self._scale)
        return y if self._bias is None else y + self._bias


class Encoder:
    """Embeddings and transformer layers: attention and feed-forward blocks, LayerNorm after each."""

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
        embedding_norm: tuple[Float, Float],
        layers: Sequence[Mapping[str, Any]],
        relative_bias: Float | None = None,
    ) -> None:
        """Set tables and layers; `threads` has no effect here.

        Args:
            hidden: size of a token's vector, divisible by `heads`.
            heads: attention heads.
            epsilon: epsilon of every LayerNorm.
            activation: a key of ACTIVATIONS.
            threads: maximum number of compute threads.
            isa: one of `available_isas()`.
            word: table of the word embeddings, (vocabulary, hidden).
            position: table of the position embeddings.
            token_type: table of the token-type embeddings, None without one.
            embedding_norm: gamma and beta (hidden,).
            layers: the Linears "query", "key", "value", "attention_output", "intermediate" and "output", and
                (gamma, beta) as "attention_norm" and "output_norm".
            relative_bias: (heads, 2 l - 1), the bias of `attention` in every layer; None without one.

        Raises:
            ValueError: an unknown activation or isa, a bias of another shape or not finite, or heads that do not divide
                `hidden`.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        if isa not in available_isas():
            raise ValueError(f"isa is {isa!r}, wanted one of {', '.join(available_isas())}")
        if heads < 1 or hidden % heads:
            raise ValueError(f"hidden size {hidden} is not divisible by {heads} heads")
        fits = relative_bias is None or (len(relative_bias) == heads and relative_bias.shape[1] % 2 == 1)
        if not fits or (relative_bias is not None and not np.isfinite(relative_bias).all()):
            raise ValueError(f"relative_bias: wanted {heads} rows of 2 * length - 1 finite numbers")
        del threads
        self._heads, self._epsilon = heads, epsilon
        self._activation = ACTIVATIONS[activation]
        self._word, self._position, self._token_type = word, position, token_type
        self._embedding_norm, self._relative_bias = embedding_norm, relative_bias
        self._layers = list(layers)
        self.barriers = 0  # threads that wait for each other

    def forward(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        types: NDArray[np.int32],
        offsets: NDArray[np.int32],
        parts: NDArray[np.int32] | None = None,
        lanes: int = 1,
        width: int | None = None,
    ) -> Float:
        """Hidden states (t, hidden) of the last layer, for (t,) ids and `offsets` (s + 1,) of s sequences.

        `parts`, `lanes` and `width`, which divide the work, have no effect here.

        Raises ValueError for an id, position or type outside its table, for offsets that do not increase from 0 to t,
        and for a sequence that is too long for the bias.
        """
        del parts, lanes, width
        if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 1).any():
            raise ValueError(f"offsets from {offsets[0]} to {offsets[-1]}; wanted to rise from 0 to {len(ids)}")
        if self._relative_bias is not None and np.diff(offsets).max() > self._relative_bias.shape[1] // 2 + 1:
            raise ValueError("a sequence is longer than the distances of relative_bias")
        x = embedding_rows(self._word, ids) + embedding_rows(self._position, positions)
        if self._token_type is not None:
            x = x + embedding_rows(self._token_type, types)
        x = self._normalized(x, self._embedding_norm)
        for layer in self._layers:
            query, key, value = (layer[name].forward(x) for name in ("query", "key", "value"))
            context = attention(query, key, value, self._heads, offsets, self._relative_bias)
            x = self._normalized(x + layer["attention_output"].forward(context), layer["attention_norm"])
            inner = self._activation(layer["intermediate"].forward(x))
            x = self._normalized(x + layer["output"].forward(inner), layer["output_norm"])
        return x

    def _normalized(self, x: Float, norm: tuple[Float, Float]) -> Float:
        gamma, beta = norm
        return layer_norm(x, gamma, beta, self._epsilon)

    def choices(self) -> list[tuple[str, str]]:
        """(name, choice) of every Linear, layer by layer."""
        return [
            (f"layer.{index}.{name}", linear.choice)
            for index, layer in enumerate(self._layers)
            for name, linear in layer.items()
            if isinstance(linear, Linear)
        ]
