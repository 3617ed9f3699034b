"""How exact a layer's output must be, for the tests of every backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vptq import reference
from vptq.config import LayerConfig

# Rounding of one operation, 2^-11, 2^-8 and 2^-24, times the four that a weight and an output go through (sum of both
# stages, scale, bias; output), float32's times the length of a sum in these tests besides.
TOLERANCE = {torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8, torch.float32: 40 * 2.0**-24}


def assert_close(y: Tensor, x: Tensor, config: LayerConfig, stored: dict[str, Tensor]) -> None:
    """Holds an output against float64, each operation allowed its rounding.

    A kernel may skip roundings of the weight that the reference makes. What they can amount to is measured by the
    largest value that each weight may pass through on its way, (|C| + |D|) |s| + |b|, not by the weight.
    """
    bias = stored.get("bias", torch.zeros(1, dtype=x.dtype)).double()
    exact = functional.linear(x.double(), reference.dequantize(config, stored).double()) + bias
    largest = reference.dequantize(config, {n: t.abs() if t.is_floating_point() else t for n, t in stored.items()})
    scale = functional.linear(x.double().abs(), largest.double()) + bias.abs() + 1e-3
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= TOLERANCE[x.dtype] * scale).all()
