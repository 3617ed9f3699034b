"""Layers that read the same input, for the tests of what runs them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from triton_layers import layer_of

from vptq.config import LayerConfig
from vptq.linear import VQuantLinear

# No size is a multiple of a tile or a step; the rows of every layer end within a vector.
ALIKE = (
    LayerConfig(611, 77, 8, 64, num_residual_centroids=8, enable_norm=True, enable_perm=True, bias=True),
    LayerConfig(611, 21, 8, 64, num_residual_centroids=8, enable_norm=True, enable_perm=True),
    LayerConfig(611, 43, 8, 64, num_residual_centroids=8, enable_norm=True, enable_perm=True, bias=True),
)
OTHER = dataclasses.replace(ALIKE[1], num_centroids=32)
"""One that needs a launch of its own beside them."""


def layers_of(configs: Sequence[LayerConfig], device: str) -> list[tuple[VQuantLinear, dict[str, Tensor]]]:
    """A random float16 layer of each, and its tensors on the CPU."""
    return [layer_of(config, torch.float16, device, seed) for seed, config in enumerate(configs)]


def group_arguments(layers: Sequence[VQuantLinear]) -> tuple[list[Tensor | None], list[int]]:
    """What `vptq::linear_group` takes besides the input."""
    tensors = [tensor for layer in layers for tensor in (*layer._stored(), layer.bias)]
    return tensors, [size for layer in layers for size in layer._sizes]
