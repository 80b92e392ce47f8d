"""What test_guard.py runs in a process of its own, with guard_allocator.cc preloaded."""

import ctypes
import dataclasses
import sys
from functools import partial

import numpy as np

from pruneofa import _native
from pruneofa.engine import reference
from tests.kernels.cases import Layer, Model, batch, float_layer, int8_layer, model, pairwise

OUTPUTS = (1, 15, 16, 17, 32, 33, 48, 65)
INPUTS = (1, 3, 15, 17, 33, 63, 64, 65, 127, 129, 200)
LONGEST = 96  # tokens of a sequence
TOKENS = (1, 15, 16, 17, 32, 33, 49)
SPARSITY = (0.0, 0.5, 0.9, 1.0)
SIZES = [(64, 8, 128), (64, 4, 100), (64, 2, 65), (128, 2, 192), (72, 9, 100), (36, 3, 50), (20, 5, 33), (96, 1, 130)]

library = ctypes.CDLL(None)
library.guarded_bytes.restype = library.guarded_new.restype = ctypes.c_void_p
library.guarded_bytes.argtypes = library.guarded_new.argtypes = [ctypes.c_size_t]
library.guarded_delete.argtypes = [ctypes.c_void_p]


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last one before a page without access."""
    memory = (ctypes.c_char * array.nbytes).from_address(library.guarded_bytes(array.nbytes))
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape) if array.size else array
    copy[...] = array
    return copy


class Native:
    """_native, given guarded copies of every array."""

    @staticmethod
    def Linear(bitmask, values, scale, bias, k, isa, input=None):
        arrays = (None if part is None else guarded(part) for part in (bitmask, values, scale, bias))
        return _native.Linear(*arrays, k, isa) if input is None else _native.Linear(*arrays, k, isa, input)

    Encoder = _native.Encoder


def guarded_model(parts: Model) -> Model:
    def pair(arrays):
        return None if arrays is None else tuple(None if one is None else guarded(one) for one in arrays)

    return dataclasses.replace(
        parts,
        tables={name: pair(table) for name, table in parts.tables.items()},
        embedding_norm=pair(parts.embedding_norm),
        relative_bias=None if parts.relative_bias is None else guarded(parts.relative_bias),
        layers=[{k: v if isinstance(v, Layer) else pair(v) for k, v in layer.items()} for layer in parts.layers],
    )


def linears(isa: str) -> None:
    random = np.random.default_rng(0)
    for n, k, m, sparsity, pattern in pairwise(OUTPUTS, INPUTS, TOKENS, SPARSITY, ("random", "4x1", "1x4")):
        layer = int8_layer(random, n, k, sparsity, pattern)
        linear = layer.build(Native, isa)
        codes = guarded(random.integers(0, 256, (m, k), dtype=np.uint8))
        np.testing.assert_array_equal(linear.accumulate(codes), layer.build(reference, "scalar").accumulate(codes))
        x = guarded(random.normal(size=(m, k)).astype(np.float32))
        linear.forward(x)
        layer = float_layer(random, n, k, sparsity)
        wanted = layer.build(reference, "scalar").forward(x)
        np.testing.assert_allclose(layer.build(Native, isa).forward(x), wanted, rtol=1e-4, atol=1e-4)


def patterns(isa: str) -> None:
    random = np.random.default_rng(0)
    for n, k, m, kept, threads in pairwise(OUTPUTS, INPUTS, (*TOKENS, 130), (0.0, 0.1, 1.0), (1, 3)):
        mask = random.random((n, k)) < kept
        x, dy, bias = (guarded(random.normal(size=size).astype(np.float32)) for size in ((m, k), (m, n), n))
        weight = guarded(np.where(mask, random.normal(size=(n, k)), 0).astype(np.float32))
        y, dx, dw = (guarded(np.zeros(size, np.float32)) for size in ((m, n), (m, k), (n, k)))
        pattern = _native.Pattern(guarded(mask), isa)
        pattern.multiply(x, weight, bias, y, threads)
        pattern.multiply_transposed(dy, weight, dx, threads)
        pattern.weight_gradient(x, dy, dw, threads)
        for found, wanted in ((y, x @ weight.T + bias), (dx, dy @ weight), (dw, (dy.T @ x) * mask)):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def encoders(isa: str, longest: int | None = None) -> None:
    """Encoders of all sizes; with `longest`, of the longest sequence, their attention has a bias by relative position.

    The longest sequence then reads the first and the last number of the bias.
    """
    for hidden, heads, inner in SIZES:
        for precision, threads in (("fp32", 1), ("int8", 1), ("static", 2)):
            parts = model(hidden=hidden, heads=heads, inner=inner, precision=precision, depth=1)
            if longest is not None:
                bias = np.random.default_rng(0).normal(size=(heads, 2 * longest - 1)).astype(np.float32)
                parts = dataclasses.replace(parts, relative_bias=bias)
            native = guarded_model(parts).build(Native, isa, threads)
            wanted = parts.build(reference, "scalar")
            for lengths in ([1], [16], [17, 3], [31, 1, 1, 33], [LONGEST], [2, 30]):
                inputs = tuple(guarded(part) for part in batch(lengths))
                error = np.abs(native.forward(*inputs) - wanted.forward(*inputs)).max()
                assert error <= (1e-4 if precision == "fp32" else 0.2), (hidden, heads, precision, lengths)


def read(kind: str) -> None:
    """Read the last byte of a block, say so, and read the next one."""
    size = 128  # a multiple of the alignment of blocks
    place = library.guarded_bytes(size) if kind == "input" else library.guarded_new(size)
    ctypes.string_at(place, size)
    print("inside", flush=True)  # noqa: T201
    if kind == "freed":
        library.guarded_delete(place)
        ctypes.string_at(place, 1)
    ctypes.string_at(place + size, 1)


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    calls = {"linears": linears, "patterns": patterns, "encoders": encoders, "read": read}
    calls["biased"] = partial(encoders, longest=LONGEST)
    calls[what](argument)
