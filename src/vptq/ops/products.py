"""`vptq::add_products` in PyTorch, for every device: second moments of a layer's inputs, in float32.

Where a CPU has instructions for bfloat16, a C++ kernel takes its place (`csrc/products_body.h`): products of numbers
rounded to bfloat16, summed in float32. PyTorch's own product of two bfloat16 matrices would round the sums as well, and
what that leaves of a Hessian is not positive (docs/log.md).
"""

from __future__ import annotations

from torch import Tensor

from vptq.errors import ConfigError
from vptq.ops.schemas import LIBRARY

SYMMETRIC_BLOCK = 384
"""Rows of a symmetric sum that are added up at once, from the diagonal on: 1.4 times the speed of the whole at 1536
inputs, 4096 tokens and 2 threads, and near twice where a layer is wide."""


def add_products(sums: Tensor, left: Tensor, right: Tensor, upper: bool = False) -> None:
    """The same as `vptq.ops.add_products`, with products in float32."""
    expected = (left.shape[-1], right.shape[-1])
    if left.dim() != 2 or right.dim() != 2 or len(left) != len(right) or sums.shape != expected:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (sums, left, right))
        raise ConfigError(f"sums, left and right are {shapes}; they must be [n, m], [N, n] and [N, m]")
    left, right = left.float(), right.float()
    step = SYMMETRIC_BLOCK if upper else max(1, len(sums))
    for start in range(0, len(sums), step):
        first = start if upper else 0
        sums[start : start + step, first:].addmm_(left[:, start : start + step].T, right[:, first:])


LIBRARY.impl("add_products", add_products, "CompositeExplicitAutograd")
