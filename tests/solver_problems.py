"""Small weights, Hessians and codebooks for the tests of the solver's parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vptq.quantize.segments import Segment


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_hessian(features: int, seed: int = 0, tokens: int = 0) -> torch.Tensor:
    """A second moment with unequal, strongly correlated inputs, as those of language models are."""
    draw = seeded(seed)
    shared = torch.randn(features, max(2, features // 4), generator=draw)
    mix = shared @ shared.T / features + 0.5 * torch.eye(features)
    spread = torch.exp(0.5 * torch.randn(features, generator=draw))
    inputs = torch.randn(tokens or 4 * features, features, generator=draw) @ mix * spread
    return inputs.T @ inputs / len(inputs)


def problem(out_features: int, in_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] with columns of unequal size and offset, and a Hessian for it."""
    draw = seeded(seed + 1000)
    sizes = torch.rand(in_features, generator=draw) + 0.5
    offsets = 0.3 * torch.randn(in_features, generator=draw)
    weight = torch.randn(out_features, in_features, generator=draw) * sizes + offsets
    return weight, correlated_hessian(in_features, seed)


def random_segments(
    columns: torch.Tensor, bounds: Sequence[int], sizes: Sequence[int], vector_len: int, seed: int = 0
) -> list[Segment]:
    """Segments over `columns` [in, out] with codebooks of random vectors, scales and shifts; nearest indices set."""
    draw = seeded(seed + 2000)
    segments = []
    for start, stop in itertools.pairwise(bounds):
        scale = torch.rand(stop - start, generator=draw) + 0.5
        shift = 0.1 * torch.randn(stop - start, generator=draw)
        segment = Segment(start, stop, vector_len, columns.shape[1], scale, shift)
        for stage, size in enumerate(sizes):
            segment.stages.append(torch.randn(size, vector_len, generator=draw) / 3**stage)
        segment.assign(columns, beam=1)
        segments.append(segment)
    return segments


def loss_of(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) for the transposed error [in, out], in float64."""
    error, hessian = error.double(), hessian.double()
    return float((error * (hessian @ error)).sum())
