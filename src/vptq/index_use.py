"""How often each centroid of a quantized model is used.

A codebook pays for all its entries; the indices say which of them the weight needed. Entries that no index names are
dead: they cost bits and do nothing. How uneven the use of the others is, its entropy tells in bits: indices of 12 bits
with an entropy of 11.5 could be stored in 11.5 on average, and not in less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.checkpoint import Checkpoint
from vptq.weight import QuantizedWeight


@dataclass(frozen=True)
class CodebookUse:
    """How often the entries of one codebook of a layer are used.

    Attributes:
        layer: Module path.
        codebook: "main", "residual" or "outlier".
        counts: Indices that name each entry, int64 [groups, centroids]; outliers have one group.
    """

    layer: str
    codebook: str
    counts: Tensor

    @property
    def dead(self) -> list[tuple[int, int]]:
        """Entries that no index names, as (group, centroid)."""
        return [(int(group), int(centroid)) for group, centroid in (self.counts == 0).nonzero()]

    @property
    def index_bits(self) -> float:
        """Bits that name one entry: the logarithm of how many there are."""
        return math.log2(self.counts.shape[1])

    @property
    def entropy(self) -> float:
        """Entropy of an index in bits, the mean over groups; at most `index_bits`."""
        share = self.counts.double() / self.counts.sum(1, keepdim=True)
        return float(-torch.special.xlogy(share, share).sum(1).mean() / math.log(2))


def codebook_uses(checkpoint: Checkpoint) -> Iterator[CodebookUse]:
    """Count the indices of every codebook, reading one layer at a time, in the order of the checkpoint's layers.

    Raises:
        CheckpointError: A layer is damaged.
    """
    for layer in checkpoint.layers():
        yield from _uses_in(layer, checkpoint.load_layer(layer))


def _uses_in(layer: str, weight: QuantizedWeight) -> Iterator[CodebookUse]:
    config = weight.config
    yield CodebookUse(layer, "main", _count(weight.indices, config.num_centroids))
    if weight.residual_indices is not None:
        yield CodebookUse(layer, "residual", _count(weight.residual_indices, config.num_residual_centroids))
    if weight.outlier_indices is not None:
        yield CodebookUse(layer, "outlier", _count(weight.outlier_indices[None], config.outlier_num_centroids))


def _count(indices: Tensor, centroids: int) -> Tensor:
    """Occurrences [groups, centroids] of the indices [groups, rows, columns]."""
    return torch.stack([group.flatten().long().bincount(minlength=centroids) for group in indices])
