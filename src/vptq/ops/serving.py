"""Which kernel serves a layer on this machine, and why: what `vptq env` shows of a model."""

from __future__ import annotations

import torch

from vptq.config import LayerConfig
from vptq.ops import triton_paths
from vptq.ops.backends import backends


def serving(config: LayerConfig, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Tokens a call, kernel and reason, of a layer on the machine's GPU, or its CPU where that is all there is.

    Args:
        config: The layer.
        dtype: Its float dtype.
    """
    status = {backend.name: backend for backend in backends() if backend.active}
    if "triton" in status:
        nvidia = torch.cuda.is_available() and torch.version.cuda is not None
        capability = torch.cuda.get_device_capability() if nvidia else None
        ways = triton_paths.describe(config.vector_len, dtype, capability)
        return [(tokens, way if way == triton_paths.TORCH else f"triton {way}", why) for tokens, way, why in ways]
    if "cpu" in status and not torch.cuda.is_available():
        return [("any", "cpu", status["cpu"].reason)]
    return [("any", triton_paths.TORCH, status["reference"].reason)]
