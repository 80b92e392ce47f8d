"""How large the numbers of a pass can become.

Quantization gives NaN a code, and a softmax may leave it out, so an overflow inside a pass could end as a finite answer
that is wrong. A model whose weights can cause one is refused when it is loaded. Blocks begin and end with LayerNorm, so
the bounds do not grow with the number of layers.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from pruneofa.errors import InputError
from pruneofa.formats.packed import PackedEmbedding, PackedLinear

Float = NDArray[np.float32]
Norm = tuple[Float, Float]  # gamma and beta
Linear = tuple[PackedLinear, Float]  # weight and bias

# Float32 ends at 3.4e38: squares of such numbers, and products of two of them, can be added up over any width that the
# kernels take. The bounds of trained encoders are a million times smaller.
LARGEST = 1e15


def sum_after_norm(norm: Norm) -> float:
    """What the absolute values of the features add up to at most after LayerNorm (Cauchy-Schwarz).

    The squares of the normalized features add up to their number.
    """
    gamma, beta = (values.astype(np.float64) for values in norm)
    return math.sqrt(len(gamma)) * float(np.linalg.norm(gamma)) + float(np.abs(beta).sum())


def largest_value(weight: PackedLinear | PackedEmbedding) -> float:
    """A bound of the absolute values of a weight: 128 times its largest scale, if it has scales."""
    if weight.scale is not None:
        return 128.0 * float(weight.scale.max())
    return float(max(weight.values.max(initial=0), -weight.values.min(initial=0)))


def largest_output(linear: Linear, inputs: float) -> float:
    """The largest absolute output of a linear layer whose inputs have absolute values that add up to `inputs`."""
    weight, bias = linear
    return largest_value(weight) * inputs + float(np.abs(bias).max())


def check_embeddings(tables: Iterable[PackedEmbedding], where: str) -> None:
    """Raises InputError, beginning with `where`, if a sum of rows of the tables can exceed LARGEST."""
    _check({"embeddings": sum(map(largest_value, tables))}, where)


def check_layer(linears: Mapping[str, Linear], norms: Mapping[str, Norm], inputs: float, where: str) -> float:
    """The `sum_after_norm` of a layer whose inputs have absolute values that add up to `inputs`.

    `linears` and `norms` are by field of `pruneofa.families.Layer`. Raises InputError, beginning with `where`, if a
    number can exceed LARGEST.
    """
    found = {name: largest_output(linears[name], inputs) for name in ("query", "key", "value")}
    hidden, inner = linears["output"][0].shape
    found["attention_output"] = inputs + largest_output(linears["attention_output"], hidden * found["value"])
    inputs = sum_after_norm(norms["attention_norm"])
    found["intermediate"] = largest_output(linears["intermediate"], inputs)
    found["output"] = inputs + largest_output(linears["output"], inner * found["intermediate"])
    _check(found, where)
    return sum_after_norm(norms["output_norm"])


def _check(found: Mapping[str, float], where: str) -> None:
    for name, bound in found.items():
        if not bound <= LARGEST:
            raise InputError(
                f"{where}: its {name} can reach {bound:.1e}, wanted at most {LARGEST:.0e}: the weights are too large "
                "for arithmetic in float32; train the model again"
            )
