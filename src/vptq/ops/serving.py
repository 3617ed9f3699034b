"""Which kernel serves a layer on this machine, and why: what `vptq env` shows of a model."""

from __future__ import annotations

import torch

from vptq.config import LayerConfig
from vptq.ops import cuda_compile, cuda_plan, devices, triton_paths
from vptq.ops.backends import backends


def serving(config: LayerConfig, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Tokens a call, kernel and reason, of a layer on the machine's GPU, or its CPU where that is all there is.

    Args:
        config: The layer.
        dtype: Its float dtype.
    """
    status = {backend.name: backend for backend in backends() if backend.active}
    if "triton" in status:
        found = torch.cuda.is_available()
        capability = devices.capability(torch.device("cuda", torch.cuda.current_device())) if found else None
        cuda = _cuda(config, dtype, capability) if capability else ""
        ways = triton_paths.describe(config.vector_len, dtype, capability, cuda)
        own_name = (triton_paths.TORCH, triton_paths.CUDA)
        return [(tokens, way if way in own_name else f"triton {way}", why) for tokens, way, why in ways]
    if "cpu" in status and not torch.cuda.is_available():
        return [("any", "cpu", status["cpu"].reason)]
    return [("any", triton_paths.TORCH, status["reference"].reason)]


def _cuda(config: LayerConfig, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """Where the CUDA kernel has a layer's codebooks; empty where it does not serve it."""
    refused = cuda_plan.obstacle(config.vector_len, dtype, config.is_packed, config.has_outliers, capability)
    if refused or cuda_compile.missing():
        return ""
    bits = [count.bit_length() - 1 for count in (config.num_centroids, config.num_residual_centroids or 1)]
    kind = cuda_plan.kind_of(dtype, config.vector_len, *bits, cuda_compile.card(torch.device("cuda", 0)))
    return cuda_plan.describe(kind) if kind else ""
