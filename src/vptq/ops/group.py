"""`vptq::linear_group` for every device: layers that read the same input, one call after the other.

A backend that can do better registers its own; Triton's serves them by one launch where they are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vptq.ops.schemas import LIBRARY

Member = tuple[tuple[Tensor | None, ...], Tensor | None, tuple[int, ...]]
"""What `vptq::linear` takes of a layer besides the input: nine stored tensors, the bias and four sizes."""


def members(tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Iterator[Member]:
    """The layers of a call, from its flat arguments."""
    for number in range(len(sizes) // 4):
        *stored, bias = tensors[10 * number : 10 * number + 10]
        yield tuple(stored), bias, tuple(sizes[4 * number : 4 * number + 4])


def linear_group(x: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """x W^T + bias of each layer, flat; see `vptq.ops.linear_group`."""
    one = torch.ops.vptq.linear.default
    return torch.cat([one(x, *stored, bias, *own).flatten() for stored, bias, own in members(tensors, sizes)])


LIBRARY.impl("linear_group", linear_group, "CompositeExplicitAutograd")
