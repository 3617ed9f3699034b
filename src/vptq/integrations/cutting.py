"""Parts of a quantized weight, for engines that share one layer among several devices.

A part is a quantized weight again, of the same codebooks and the indices of its rows or columns: every kernel runs it,
and it holds exactly the numbers of the whole. Where a cut does not fall between vectors, or takes unequal numbers of
columns from the groups, the part is a little larger than what was asked for; the caller is told by how much.

The layer's own bias takes no part in this: it has to be None.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from vptq.weight import QuantizedWeight


def cut_rows(weight: QuantizedWeight, start: int, stop: int) -> tuple[QuantizedWeight, int]:
    """Output rows start..stop of a weight.

    Args:
        weight: The whole.
        start: First row, at least 0.
        stop: One past the last row, at most out_features.

    Returns:
        The part, and how many rows it has in front of `start`: those from where a vector begins.
    """
    config = weight.config
    surplus = start % math.lcm(config.vector_len, config.outlier_vector_len or 1)
    first = start - surplus
    rows = slice(first // config.vector_len, -(-stop // config.vector_len))
    outliers = weight.outlier_indices
    if outliers is not None:
        outliers = outliers[first // config.outlier_vector_len : -(-stop // config.outlier_vector_len)]
    part = dataclasses.replace(
        weight,
        config=dataclasses.replace(config, out_features=stop - first),
        indices=weight.indices[:, rows],
        residual_indices=None if weight.residual_indices is None else weight.residual_indices[:, rows],
        outlier_indices=outliers,
    )
    return part, surplus


def cut_columns(weight: QuantizedWeight, start: int, stop: int) -> tuple[QuantizedWeight, int]:
    """Input columns start..stop of a weight, counted in the original order of columns.

    Each codebook keeps the columns it has of these. A group that is left with fewer than another is filled up with
    columns whose input is zero, and one that is left with none goes.

    Args:
        weight: The whole.
        start: First column, at least 0.
        stop: One past the last column, at most in_features.

    Returns:
        The part, and how many zeros its input needs at the end.

    Raises:
        ConfigError: The part has more columns than a permutation of the format can number.
    """
    config, device = weight.config, weight.indices.device
    order = torch.arange(config.in_features, device=device) if weight.perm is None else weight.perm.to(device)
    wanted = (order >= start) & (order < stop)
    outliers = wanted[: config.outlier_size].nonzero().flatten()
    groups = wanted[config.outlier_size :].view(config.num_groups, config.group_size)
    kept = groups.any(1).nonzero().flatten() if groups.any() else torch.zeros(1, dtype=torch.int64, device=device)
    # Those wanted first, in the order they had; what follows them is filled up with, whatever it is.
    columns = torch.argsort((~groups[kept]).byte(), dim=1, stable=True)[:, : max(1, int(groups.sum(1).max()))]
    is_filling = ~groups[kept].gather(1, columns)
    zeros = int(is_filling.sum())

    main = order[config.outlier_size :].view(groups.shape)[kept].gather(1, columns) - start
    main[is_filling] = torch.arange(stop - start, stop - start + zeros, device=device)
    perm = torch.cat([order[outliers] - start, main.flatten()])
    has_outliers = len(outliers) > 0
    part = dataclasses.replace(
        weight,
        config=dataclasses.replace(
            config,
            in_features=stop - start + zeros,
            num_groups=len(kept),
            group_size=columns.shape[1],
            outlier_size=len(outliers),
            outlier_vector_len=config.outlier_vector_len if has_outliers else 0,
            outlier_num_centroids=config.outlier_num_centroids if has_outliers else 0,
            enable_perm=not torch.equal(perm, torch.arange(len(perm), device=device)),
        ),
        codebook=weight.codebook[kept],
        indices=_columns_of(weight.indices, kept, columns),
        outlier_codebook=weight.outlier_codebook if has_outliers else None,
        weight_scale=_extended(weight.weight_scale, start, stop, zeros),
        weight_bias=_extended(weight.weight_bias, start, stop, zeros),
    )
    part.perm = perm if part.config.enable_perm else None
    if weight.outlier_indices is not None:
        part.outlier_indices = weight.outlier_indices[:, outliers] if has_outliers else None
    if weight.residual_codebook is not None and weight.residual_indices is not None:
        part.residual_codebook = weight.residual_codebook[kept]
        part.residual_indices = _columns_of(weight.residual_indices, kept, columns)
    return part.absorb_perm(), zeros


def _columns_of(indices: Tensor, groups: Tensor, columns: Tensor) -> Tensor:
    """Of some groups [n] of indices [G, R, S] the columns [n, size]."""
    chosen = indices[groups]
    return chosen.gather(2, columns[:, None].expand(-1, chosen.shape[1], -1))


def _extended(per_column: Tensor | None, start: int, stop: int, zeros: int) -> Tensor | None:
    return None if per_column is None else functional.pad(per_column[start:stop], (0, zeros))
