"""The product's public code, seen through the interface that the golden checker asks for.

python ../shared/format/check.py tests/golden/adapter.py ../shared/format/golden --native --packing
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vptq import reference
from vptq.config import LayerConfig
from vptq.linear import VQuantLinear
from vptq.packing import pack, unpack

__all__ = ["dequantize", "dequantize_native", "forward", "pack", "unpack"]


def dequantize(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The dense weight as the layer makes it."""
    return VQuantLinear.from_tensors(LayerConfig.from_entry(config), tensors).dequantize()


def dequantize_native(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The dense weight as the reference defines it, after checking that the layer's is the same bit for bit."""
    weight = reference.dequantize(LayerConfig.from_entry(config), tensors)
    if not weight.equal(dequantize(config, tensors)):
        raise AssertionError("the layer's weight differs from the reference's")
    return weight


def forward(config: dict[str, Any], tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer's output for x, given in float32."""
    layer = VQuantLinear.from_tensors(LayerConfig.from_entry(config), tensors)
    return layer(x.to(layer.dtype))
