"""The three products of a linear layer in training (output, gradient of the input, of the weights) on one thread.

    python benchmarks/sparse_products.py [--tokens 425 1300] [--isa NAME] [--out FILE.json]

For the shapes of MiniLM: dense by PyTorch, the kernels that skip zeros (all of a call: values read from the dense
weight, transpositions, a dense gradient), and PyTorch's CSR (`mm`, `sampled_addmm`; only the products themselves, of
operands that are transposed already). CPU milliseconds, the least of several runs: they depend little on other load.
Every product is compared with the dense one of the same weights; exit code 1 if one differs by more than rounding.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import MINILM, machine
from torch import Tensor

from pruneofa import _native

RUNS = 9
SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
ROUNDING = 1e-4  # of the largest value of a product: sums of up to 1536 floats in another order


def milliseconds(call: Callable[[], Any]) -> float:
    """The least CPU time of a call."""
    call()
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return round(1e3 * min(times), 2)


def check(name: str, found: Any, wanted: Tensor) -> None:
    """SystemExit unless a product is the dense one up to rounding."""
    error, largest = float((torch.as_tensor(found) - wanted).abs().max()), float(wanted.abs().max())
    if not error <= ROUNDING * largest:
        raise SystemExit(f"{name} is wrong by up to {error:.3g}; its largest value is {largest:.3g}")


def skipping(kept: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, isa: str) -> list[float]:
    """The products by the native kernels."""
    pattern = _native.Pattern(kept.numpy(), isa)
    given, factors, offset, slopes = (tensor.numpy() for tensor in (x, weight, bias, dy))
    y, dx, dw = np.empty_like(slopes), np.empty_like(given), np.empty_like(factors)
    times = [
        milliseconds(lambda: pattern.multiply(given, factors, offset, y, 1)),
        milliseconds(lambda: pattern.multiply_transposed(slopes, factors, dx, 1)),
        milliseconds(lambda: pattern.weight_gradient(given, slopes, dw, 1)),
    ]
    check("skipping, output", y, torch.addmm(bias, x, weight.t()))
    check("skipping, gradient of the input", dx, dy @ weight)
    check("skipping, gradient of the weights", dw, (dy.t() @ x) * kept)
    return times


def by_csr(x: Tensor, weight: Tensor, dy: Tensor) -> list[float]:
    """The products by PyTorch's sparse matrices."""
    rows, columns = weight.to_sparse_csr(), weight.t().contiguous().to_sparse_csr()
    x_t, dy_t = x.t().contiguous(), dy.t().contiguous()
    products = (
        lambda: rows @ x_t,
        lambda: columns @ dy_t,
        lambda: torch.sparse.sampled_addmm(rows, dy_t, x, beta=0.0),
    )
    check("CSR, output", products[0](), weight @ x_t)
    check("CSR, gradient of the input", products[1](), weight.t() @ dy_t)
    check("CSR, gradient of the weights", products[2]().to_dense(), (dy_t @ x) * (weight != 0))
    return [milliseconds(product) for product in products]


def main() -> None:
    """Print a line per shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[425, 1300])
    parser.add_argument("--isa", default=_native.available_isas()[-1])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    hidden, inner = MINILM["hidden_size"], MINILM["intermediate_size"]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens in options.tokens:
        for outputs, inputs in ((hidden, hidden), (inner, hidden), (hidden, inner)):
            x, dy = (torch.randn(tokens, size, generator=generator) for size in (inputs, outputs))
            dense, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs)
            row: dict[str, Any] = {"tokens": tokens, "outputs": outputs, "inputs": inputs}
            products = (lambda: torch.addmm(bias, x, dense.t()), lambda: dy @ dense, lambda: dy.t() @ x)  # noqa: B023
            row["dense"] = [milliseconds(product) for product in products]
            masks = {s: torch.rand(outputs, inputs, generator=generator) >= s for s in SPARSITIES}
            for sparsity, kept in masks.items():
                row[f"skipping {sparsity}"] = skipping(kept, x, dense * kept, bias, dy, options.isa)
            row[f"csr {SPARSITIES[-1]}"] = by_csr(x, dense * masks[SPARSITIES[-1]], dy)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "isa": options.isa, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
