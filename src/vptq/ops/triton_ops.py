"""`vptq::linear` and `vptq::dequantize` on GPUs, by the Triton and CUDA kernels: what the dispatcher calls.

Which kernel serves a call follows from its number of tokens and the layer's sizes alone (`triton_paths`), so choosing
never waits for the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from vptq.errors import ConfigError
from vptq.ops import cuda_compile, cuda_launch, cuda_plan, dense, devices, group, triton_launch, triton_paths
from vptq.ops.schemas import check_codebook_form, check_input
from vptq.ops.triton_layer import Layer, Pointers, layer_sizes, signature

Stored = tuple[Tensor | None, ...]
"""A layer's nine tensors, as the operators take them."""
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


def linear_group(x: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """`linear` of layers that read the same input, by one launch where it can be; see `vptq.ops.linear_group`."""
    y = None
    if 1 <= x.numel() // sizes[0] <= triton_paths.GROUP_TOKENS:
        y = _one_launch(x, list(group.members(tensors, sizes)))
    return group.linear_group(x, tensors, sizes) if y is None else y


def _one_launch(x: Tensor, members: list[group.Member]) -> Tensor | None:
    """The layers' outputs, flat; None where they have to be launched one by one."""
    layers = [_layer(*member) for member in members]
    if len(layers) > cuda_plan.LAYERS or not all(layer.sizes.is_like(layers[0].sizes) for layer in layers):
        return None
    (codebook, indices, _, _, outlier_codebook, *_), _, (in_features, _, vector_len, _) = members[0]
    assert codebook is not None
    assert indices is not None
    check_input(x, codebook, in_features)
    y = None
    if _takes_cuda(codebook, indices, outlier_codebook, vector_len):
        y = _multiply(triton_paths.CUDA, x, layers)
    if y is None and x.numel() // in_features <= triton_paths.VECTOR_TOKENS and not _refuses(codebook, vector_len):
        y = _multiply(triton_paths.VECTOR, x, layers)
    return y


def multiply(
    way: str, x: Tensor, stored: Stored, bias: Tensor | None, sizes: tuple[int, int, int, int]
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
    y = _multiply(way, x, [_layer(stored, bias, sizes)])
    return None if y is None else y.view(*x.shape[:-1], sizes[1])


def _multiply(way: str, x: Tensor, layers: Sequence[Layer]) -> Tensor | None:
    """The outputs of alike layers by one launch, flat; TILES takes only one layer."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    with devices.current(x.device):
        if way == triton_paths.CUDA:
            return cuda_launch.decode(flat, layers)
        if way == triton_paths.VECTOR:
            return triton_launch.vector(flat, layers)
        return triton_launch.tiles(flat, *layers)


def _layer(stored: Stored, bias: Tensor | None, sizes: tuple[int, ...]) -> Layer:
    checked = layer_sizes(signature(stored), *sizes)
    if bias is not None:
        if bias.shape != (sizes[1],):
            raise ConfigError(f"the bias has shape {tuple(bias.shape)}; this layer needs ({sizes[1]},)")
        bias = bias.contiguous()
    return Layer(_pointers(stored), bias, checked)


def _dequantize(stored: Stored, sizes: tuple[int, int, int, int]) -> Tensor:
    assert stored[0] is not None
    with devices.current(stored[0].device):
        return triton_launch.dequantize(_pointers(stored), layer_sizes(signature(stored), *sizes))


def _pointers(stored: Stored) -> Pointers:
    return {
        name: None if tensor is None else tensor.contiguous() for name, tensor in zip(_POINTERS, stored, strict=True)
    }


def _refuses(codebook: Tensor, vector_len: int) -> bool:
    why = triton_paths.obstacle(vector_len, codebook.dtype, devices.capability(codebook.device))
    if why:
        _tell(why)
    return bool(why)


def _takes_cuda(codebook: Tensor, indices: Tensor, outlier_codebook: Tensor | None, vector_len: int) -> bool:
    capability = devices.capability(codebook.device)
    if capability is None or cuda_compile.missing():
        return False
    packed = indices.dtype == torch.int32
    return not cuda_plan.obstacle(vector_len, codebook.dtype, packed, outlier_codebook is not None, capability)


@lru_cache
def _tell(why: str) -> None:
    """Once for each reason."""
    logging.getLogger("vptq").warning("vptq runs layers in PyTorch instead of its Triton kernels: %s", why)
