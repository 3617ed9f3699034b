"""GPUs without bfloat16 run checkpoints of it as float16, if every number fits.

float16 has three bits more and a far smaller range. Weights of language models fit; where one does not, it would become
infinite and every output with it, so that is an error and not a surprise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vptq.errors import CheckpointError

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
    """Raises CheckpointError, naming the tensor, where a parameter has become infinite."""
    for name, tensor in model.named_parameters():
        if tensor.dtype == torch.float16 and tensor.device.type != "meta" and not tensor.isfinite().all():
            raise CheckpointError(
                f"{name} holds numbers beyond float16's 65504, and this GPU has no bfloat16; "
                "load with dtype=torch.float32"
            )


def _without_bfloat16(device_map: Any) -> str:
    """Name of the GPU that lacks it; empty where none does or none is used."""
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    if all(device is None or str(device) in _NO_GPU for device in devices) or not torch.cuda.is_available():
        return ""
    return "" if torch.cuda.is_bf16_supported(including_emulation=False) else torch.cuda.get_device_name()
