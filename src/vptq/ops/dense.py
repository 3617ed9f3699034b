"""`vptq::dequantize` and `vptq::linear` in vectorized PyTorch, for every device.

The backend that is always there, and the right one for many tokens: the dense weight is made once and a matrix
multiplication does the rest. It gives bit for bit what `vptq.reference` gives. A band of vector rows at a time is
unpacked, looked up, reordered and scaled, so that the temporaries (an int64 index a vector, a few copies of the band)
stay small and in cache however large the layer is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vptq.ops.schemas import LIBRARY, check_input
from vptq.packing import from_carrier, unpack

_BAND_WEIGHTS = 1 << 21


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
    outliers = None
    if outlier_codebook is not None and outlier_indices is not None:
        table = outlier_codebook.view(-1, outlier_vector_len)
        vectors = functional.embedding(from_carrier(outlier_indices[0]), table)
        outliers = vectors.transpose(1, 2).flatten(0, 1)[:out_features]
    position = None if perm is None else torch.argsort(from_carrier(perm))

    weight = codebook.new_empty(out_features, in_features)
    band = max(1, _BAND_WEIGHTS // (in_features * vector_len))
    columns = in_features - (0 if outliers is None else outliers.shape[1])
    for first in range(0, indices.shape[1], band):
        rows = slice(first * vector_len, min((first + band) * vector_len, out_features))
        vectors = _look_up_band(
            codebook,
            indices[:, first : first + band],
            residual_codebook,
            None if residual_indices is None else residual_indices[:, first : first + band],
            columns // indices.shape[0],
            vector_len,
        )
        # [groups, R, columns, v]: a vector runs down the output rows, the groups lie side by side.
        block = vectors.permute(1, 3, 0, 2).reshape(-1, columns)[: rows.stop - rows.start]
        if outliers is not None:
            block = torch.cat((outliers[rows], block), dim=1)
        if position is not None:
            block = block.index_select(1, position)
        # Scale and bias belong to original columns, and round one after the other.
        if weight_scale is not None:
            block = block * weight_scale
        if weight_bias is not None:
            block = block + weight_bias
        weight[rows] = block
    return weight


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
) -> Tensor:
    """x W^T + bias through the dense weight; see `vptq.ops.linear`."""
    check_input(x, codebook, in_features)
    weight = dequantize(
        codebook,
        indices,
        residual_codebook,
        residual_indices,
        outlier_codebook,
        outlier_indices,
        perm,
        weight_scale,
        weight_bias,
        in_features,
        out_features,
        vector_len,
        outlier_vector_len,
    )
    return functional.linear(x, weight, bias)


def _look_up_band(
    codebook: Tensor,
    indices: Tensor,
    residual_codebook: Tensor | None,
    residual_indices: Tensor | None,
    group_size: int,
    vector_len: int,
) -> Tensor:
    """Vectors [groups, R, group_size, vector_len] of some vector rows, both stages summed."""
    if indices.dtype == torch.int32:
        residual_bits = 0 if residual_codebook is None else _entry_bits(residual_codebook, vector_len)
        main, residual = unpack(indices, _entry_bits(codebook, vector_len), residual_bits, group_size)
    else:
        main = from_carrier(indices)
        residual = None if residual_indices is None else from_carrier(residual_indices)
    vectors = _look_up(codebook, main, vector_len)
    if residual_codebook is not None and residual is not None:
        vectors += _look_up(residual_codebook, residual, vector_len)
    return vectors


def _look_up(codebook: Tensor, indices: Tensor, vector_len: int) -> Tensor:
    """Entries of [groups, K * vector_len] codebooks, each group's indices into its own."""
    entries = codebook.shape[1] // vector_len
    starts = torch.arange(codebook.shape[0], device=indices.device).view(-1, 1, 1) * entries
    return functional.embedding(indices + starts, codebook.view(-1, vector_len))


def _entry_bits(codebook: Tensor, vector_len: int) -> int:
    return (codebook.shape[1] // vector_len - 1).bit_length()


LIBRARY.impl("dequantize", dequantize, "CompositeExplicitAutograd")
LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
