"""GPUs without bfloat16 run checkpoints of it as float16, if every number fits.

float16 has three bits more and a far smaller range. Weights of language models fit; where one does not, it would become
infinite and every output with it, so that is an error and not a surprise. Activations are not watched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vptq.errors import CheckpointError
from vptq.linear import VQuantLinear

_NO_GPU = ("cpu", "disk", "meta")


def dtype_for(dtype: torch.dtype, device_map: Any) -> torch.dtype:
    """The dtype to load a model in: `dtype`, or float16 where a GPU that gets part of it has no bfloat16.

    Args:
        dtype: What the model would be loaded in.
        device_map: As given to `from_pretrained`.
    """
    if dtype == torch.bfloat16 and (gpu := _without_bfloat16(device_map)):
        logging.getLogger("vptq").warning("%s has no bfloat16: the model runs in float16", gpu)
        return torch.float16
    return dtype


def check_fits(model: nn.Module) -> None:
    """Raises CheckpointError, naming the tensor or layer, where a number has become infinite.

    That is a parameter, or a weight that a quantized layer makes of parameters which all fit.
    """
    for name, tensor in model.named_parameters():
        if tensor.dtype == torch.float16 and _is_here(tensor) and not tensor.isfinite().all():
            raise CheckpointError(_TOO_LARGE.format(name))
    for name, layer in model.named_modules():
        if isinstance(layer, VQuantLinear) and all(map(_is_here, layer.parameters())) and not _weights_fit(layer):
            raise CheckpointError(_TOO_LARGE.format(f"the weight of {name}"))


_TOO_LARGE = "{} holds numbers beyond float16's 65504, and this GPU has no bfloat16; load with dtype=torch.float32"


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type != "meta"


def _weights_fit(layer: VQuantLinear) -> bool:
    """Whether all weights of a layer are finite; they are made only if the largest of each part would not fit."""
    floats = {name: tensor for name, tensor in layer.named_parameters() if tensor.is_floating_point()}
    largest = {name: float(tensor.abs().max()) for name, tensor in floats.items()}
    entry = largest["centroids.weight"] + largest.get("res_centroids.weight", 0.0)
    entry = max(entry, largest.get("outlier_centroids.weight", 0.0))
    weight = entry * largest.get("weight_scale", 1.0) + largest.get("weight_bias", 0.0)
    return weight <= torch.finfo(layer.dtype).max or bool(layer.dequantize().isfinite().all())


def _without_bfloat16(device_map: Any) -> str:
    """Name of the GPU that lacks it; empty where none does or none is used."""
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    if all(device is None or str(device) in _NO_GPU for device in devices) or not torch.cuda.is_available():
        return ""
    return "" if torch.cuda.is_bf16_supported(including_emulation=False) else torch.cuda.get_device_name()
