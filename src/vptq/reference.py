"""The format's meaning, in slow and obvious PyTorch.

Every kernel is tested against these two functions, so they are written to be checked by eye against the format's
definition, column block by column block, and not to be fast: models run through `vptq.ops`. They round where the
published implementation rounds (after the sum of both stages, after the scale, after the bias, each in the layer's
dtype), which makes the dense weight reproducible bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vptq.config import LayerConfig
from vptq.weight import QuantizedWeight


def dequantize(config: LayerConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """The dense weight of a stored layer.

    Args:
        config: The layer.
        tensors: Its tensors by on-disk name, in any dtype the format allows.

    Returns:
        [out_features, in_features] in the dtype of the main codebook.

    Raises:
        CheckpointError: The tensors contradict `config`.
    """
    stored = QuantizedWeight.from_tensors(config, tensors)
    blocks = []
    if stored.outlier_codebook is not None and stored.outlier_indices is not None:
        blocks.append(_look_up(stored.outlier_codebook, stored.outlier_indices, config.out_features))
    for group in range(config.num_groups):
        block = _look_up(stored.codebook[group], stored.indices[group], config.out_features)
        if stored.residual_codebook is not None and stored.residual_indices is not None:
            residual = stored.residual_codebook[group]
            block = block + _look_up(residual, stored.residual_indices[group], config.out_features)
        blocks.append(block)
    weight = torch.cat(blocks, dim=1)

    if stored.perm is not None:
        ordered = torch.empty_like(weight)
        ordered[:, stored.perm] = weight
        weight = ordered
    if stored.weight_scale is not None and stored.weight_bias is not None:
        weight = weight * stored.weight_scale
        weight = weight + stored.weight_bias
    return weight


def linear(config: LayerConfig, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The layer's output, x W^T + bias.

    Args:
        config: The layer.
        tensors: Its tensors by on-disk name.
        x: [..., in_features] in the layer's dtype.

    Returns:
        [..., out_features] in the layer's dtype.

    Raises:
        CheckpointError: The tensors contradict `config`.
    """
    return torch.nn.functional.linear(x, dequantize(config, tensors), tensors.get("bias"))


def _look_up(codebook: Tensor, indices: Tensor, out_features: int) -> Tensor:
    """[R, S] indices into a [K, v] codebook give the first `out_features` rows of an [R*v, S] block."""
    vectors = codebook[indices]  # [R, S, v]: a vector runs down the output rows of one column
    return vectors.transpose(1, 2).reshape(-1, indices.shape[1])[:out_features]
