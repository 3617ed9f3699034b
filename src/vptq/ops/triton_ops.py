"""`vptq::linear` and `vptq::dequantize` on GPUs, by the Triton and CUDA kernels: what the dispatcher calls.

Which kernel serves a call follows from its number of tokens and the layer's sizes alone (`triton_paths`), so choosing
never waits for the GPU.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from vptq.errors import ConfigError
from vptq.ops import cuda_compile, cuda_launch, cuda_plan, dense, triton_launch, triton_paths
from vptq.ops.schemas import check_codebook_form, check_input
from vptq.ops.triton_layer import layer_sizes, signature

_POINTERS = (
    *("codebook", "indices", "residual_codebook", "residual_indices", "outlier_codebook", "outlier_indices"),
    *("perm", "scale", "shift"),
)


def dequantize(
    codebook: Tensor,
    indices: Tensor,
    residual_codebook: Tensor | None,
    residual_indices: Tensor | None,
    outlier_codebook: Tensor | None,
    outlier_indices: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    in_features: int,
    out_features: int,
    vector_len: int,
    outlier_vector_len: int,
) -> Tensor:
    """The dense weight [out_features, in_features], in the codebook's dtype; see `vptq.ops.dequantize`."""
    stored = (
        *(codebook, indices, residual_codebook, residual_indices, outlier_codebook, outlier_indices),
        *(perm, weight_scale, weight_bias),
    )
    if _refuses(codebook, vector_len):
        return dense.dequantize(*stored, in_features, out_features, vector_len, outlier_vector_len)
    return _dequantize(stored, (in_features, out_features, vector_len, outlier_vector_len))


def linear(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    residual_codebook: Tensor | None,
    residual_indices: Tensor | None,
    outlier_codebook: Tensor | None,
    outlier_indices: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    vector_len: int,
    outlier_vector_len: int,
    codebook_form: str = "",
) -> Tensor:
    """x W^T + bias, always with exact codebooks; see `vptq.ops.linear`."""
    check_input(x, codebook, in_features)
    check_codebook_form(codebook_form)
    stored = (
        *(codebook, indices, residual_codebook, residual_indices, outlier_codebook, outlier_indices),
        *(perm, weight_scale, weight_bias),
    )
    sizes = (in_features, out_features, vector_len, outlier_vector_len)
    tokens = x.numel() // in_features
    way = triton_paths.choose(tokens, _takes_cuda(codebook, indices, outlier_codebook, vector_len))
    if way == triton_paths.CUDA:
        y = multiply(way, x, stored, bias, sizes)
        if y is not None:
            return y
        way = triton_paths.choose(tokens)
    if _refuses(codebook, vector_len):
        return dense.linear(x, *stored, bias, *sizes)
    if tokens == 0 or way == triton_paths.DENSE:
        return functional.linear(x, _dequantize(stored, sizes), bias)
    y = multiply(way, x, stored, bias, sizes)
    assert y is not None
    return y


def multiply(
    way: str, x: Tensor, stored: tuple[Tensor | None, ...], bias: Tensor | None, sizes: tuple[int, int, int, int]
) -> Tensor | None:
    """`linear` by the way named, whatever the number of tokens: for `linear`, tests and benchmarks.

    None where the CUDA kernel was named and cannot be run now; see `cuda_launch.decode`.

    Args:
        way: One of `triton_paths`: CUDA (up to 8 tokens), VECTOR, TILES or DENSE.
        x: [..., in_features], at least one token.
        stored: The layer's nine tensors.
        bias: [out_features], or None.
        sizes: The layer's four sizes.
    """
    if way == triton_paths.DENSE:
        return functional.linear(x, _dequantize(stored, sizes), bias)
    checked = layer_sizes(signature(stored), *sizes)
    if bias is not None:
        if bias.shape != (sizes[1],):
            raise ConfigError(f"the bias has shape {tuple(bias.shape)}; this layer needs ({sizes[1]},)")
        bias = bias.contiguous()
    flat = x.reshape(-1, sizes[0]).contiguous()
    pointers = _pointers(stored)
    with _current(x.device):
        if way == triton_paths.CUDA:
            y = cuda_launch.decode(flat, pointers, bias, checked)
        else:
            launch = triton_launch.vector if way == triton_paths.VECTOR else triton_launch.tiles
            y = launch(flat, pointers, bias, checked)
    return None if y is None else y.view(*x.shape[:-1], sizes[1])


def _dequantize(stored: tuple[Tensor | None, ...], sizes: tuple[int, int, int, int]) -> Tensor:
    assert stored[0] is not None
    with _current(stored[0].device):
        return triton_launch.dequantize(_pointers(stored), layer_sizes(signature(stored), *sizes))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the layer."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


def _pointers(stored: tuple[Tensor | None, ...]) -> triton_launch.Stored:
    return {
        name: None if tensor is None else tensor.contiguous() for name, tensor in zip(_POINTERS, stored, strict=True)
    }


def _refuses(codebook: Tensor, vector_len: int) -> bool:
    why = triton_paths.obstacle(vector_len, codebook.dtype, _capability(codebook.device))
    if why:
        _tell(why)
    return bool(why)


def _takes_cuda(codebook: Tensor, indices: Tensor, outlier_codebook: Tensor | None, vector_len: int) -> bool:
    capability = _capability(codebook.device)
    if capability is None or cuda_compile.missing():
        return False
    packed = indices.dtype == torch.int32
    return not cuda_plan.obstacle(vector_len, codebook.dtype, packed, outlier_codebook is not None, capability)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


@lru_cache
def _tell(why: str) -> None:
    """Once for each reason."""
    logging.getLogger("vptq").warning("vptq runs layers in PyTorch instead of its Triton kernels: %s", why)
