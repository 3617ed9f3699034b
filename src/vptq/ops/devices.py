"""What has to be known of a device before a kernel is launched on it.

Callers write `devices.capability`, never its name alone, so that a test can stand in for a GPU in one place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch


@lru_cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for every other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of the usual size a device runs at once; 1 for a CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one, which Triton launches on, and which need not be the one that holds a tensor."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)
