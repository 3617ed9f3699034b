"""Layers through the Triton kernels, on a GPU or in Triton's interpreter, held against the reference on the CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from layer_checks import assert_close
from random_layers import random_weight
from torch import Tensor

from vptq import reference
from vptq.config import LayerConfig
from vptq.linear import VQuantLinear

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICES = (
    pytest.param("cpu", marks=pytest.mark.skipif(not _INTERPRETED, reason="Triton's interpreter is for no GPU")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
)
"""For a parameter `device`: the interpreter where there is no GPU, and the GPU."""


def layer_of(
    config: LayerConfig, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[VQuantLinear, dict[str, Tensor]]:
    """A random layer on the device, and its tensors on the CPU."""
    stored = random_weight(config, dtype, seed).to_tensors(dtype)
    return VQuantLinear.from_tensors(config, stored).to(device), stored


def multiply(layer: VQuantLinear, x: Tensor, way: str = "") -> Tensor:
    """The layer's output, on the CPU, by the Triton kernels for so many tokens, or by the way named."""
    from vptq.ops import cuda_compile, triton_ops

    x = x.to(layer.indices.device)
    if way:
        return triton_ops.multiply(way, x, layer._stored(), layer.bias, layer._sizes).cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_compile, "missing", lambda: "these tests are about Triton")
        return triton_ops.linear(x, *layer._stored(), layer.bias, *layer._sizes).cpu()


def check_layer(config: LayerConfig, dtype: torch.dtype, device: str, tokens: tuple[int, ...] = (1, 3)) -> None:
    """The dense weight is the reference's bit for bit, and the outputs for each number of tokens are that weight's."""
    from vptq.ops import triton_ops

    layer, stored = layer_of(config, dtype, device)
    dense = triton_ops.dequantize(*layer._stored(), *layer._sizes)
    assert torch.equal(dense.cpu(), reference.dequantize(config, stored))
    for count in tokens:
        x = torch.randn(count, config.in_features, generator=torch.Generator().manual_seed(count)).to(dtype)
        assert_close(multiply(layer, x), x, config, stored)
