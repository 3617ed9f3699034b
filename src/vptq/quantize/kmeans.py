"""Weighted k-means over weight vectors: the codebook initialisation of VPTQ (arXiv 2409.17066, section 3.2, eq. 6).

The proxy loss of a quantized column j, other columns exact, is H_jj |w - c|^2, so a vector is worth the Hessian
diagonal of its column. Seeding draws from the D^2 distribution (k-means++) in batches: one draw a batch is exact
k-means++; 16 batches cost one assignment pass in all, so that 65,536 centroids over millions of vectors are seeded in
seconds. Every random number comes from the caller's generator, every sum runs in a fixed order: same seed, same
centroids.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vptq.errors import ConfigError
from vptq.ops import nearest
from vptq.ops.scatter import add_by_index

SEEDING_ROUNDS = 16
"""D^2 batches. On SmolLM2's 20.gate_proj, 8, 16, 64 and 256 rounds end within 1% of each other, less than two seeds
differ by (v4-k64, v4-k256, v6-k4096; docs/log.md)."""

LINE = 4096
"""Numbers that a GPU adds up at once for a running sum."""


def weighted_kmeans(
    vectors: Tensor,
    weights: Tensor,
    num_centroids: int,
    generator: torch.Generator,
    *,
    max_iterations: int = 20,
    tolerance: float = 2e-3,
) -> Tensor:
    """Centroids that minimize sum_i weights_i |vectors_i - nearest centroid|^2, as far as Lloyd's iteration goes.

    Args:
        vectors: [N, v] float32, finite.
        weights: [N] float32, not negative; all zero counts as all one.
        num_centroids: k >= 1; with N <= k the vectors themselves are returned, padded with repeats of the last one.
        generator: the only source of randomness; on the CPU, wherever `vectors` are.
        max_iterations: Lloyd steps at most.
        tolerance: stop when a step lowers the weighted error by less than this share of it.

    Returns:
        [k, v] float32. Every centroid has a vector of its own unless there are fewer distinct vectors than centroids.

    Raises:
        ConfigError: for an empty or non-finite input.
    """
    if vectors.shape[0] == 0 or num_centroids < 1:
        raise ConfigError(f"k-means needs vectors and centroids, got {vectors.shape[0]} and {num_centroids}")
    if not (torch.isfinite(vectors).all() and torch.isfinite(weights).all()):
        raise ConfigError("k-means input holds NaN or infinite values: check the weight and the Hessian of this layer")
    if vectors.shape[0] <= num_centroids:
        repeats = vectors[-1:].expand(num_centroids - vectors.shape[0], -1)
        return torch.cat([vectors, repeats]).contiguous()
    vectors = vectors.contiguous()
    weights = torch.ones_like(weights) if not bool((weights > 0).any()) else weights
    centroids = _seed(vectors, weights, num_centroids, generator)
    previous = float("inf")
    for _ in range(max_iterations):
        indices, distances = nearest(vectors, centroids)
        errors = distances[:, 0] * weights
        total = float(errors.sum(dtype=torch.float64))
        centroids = _means(vectors, weights, indices[:, 0], errors, centroids)
        if total >= previous * (1.0 - tolerance):
            break
        previous = total
    return centroids


def _seed(vectors: Tensor, weights: Tensor, num_centroids: int, generator: torch.Generator) -> Tensor:
    """k-means++ in batches; a vector already chosen has distance zero and is not drawn again."""
    batch = max(1, num_centroids // SEEDING_ROUNDS)
    chosen = _draw(weights, 1, generator)
    closest = nearest(vectors, vectors[chosen])[1][:, 0]
    while len(chosen) < num_centroids:
        wanted = min(batch, num_centroids - len(chosen))
        drawn = _draw(weights * closest, wanted, generator)
        if len(drawn) == 0:  # fewer distinct vectors than centroids: the rest may be anything, so take what is there
            drawn = chosen[:1].expand(wanted)
        chosen = torch.cat([chosen, drawn])
        closest = torch.minimum(closest, nearest(vectors, vectors[drawn])[1][:, 0])
    return vectors[chosen].clone()


def _draw(mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` different positions, drawn in proportion to `mass` by inverting its running sum.

    torch.multinomial refuses more than 2^24 categories; a 7B down_proj has more vectors than that at v=2.
    """
    running = _running_sum(mass.to(torch.float64))
    total = running[-1]
    if not bool(total > 0):
        return torch.empty(0, dtype=torch.int64, device=mass.device)
    points = torch.rand(count, generator=generator, dtype=torch.float64).to(mass.device) * total
    positions = torch.searchsorted(running, points, right=True).clamp_(max=len(mass) - 1)
    unique: Tensor = torch.unique(positions)
    return unique


def _running_sum(mass: Tensor) -> Tensor:
    """[N] cumulative sums; on a GPU line by line, since those of one long line are added in an order that varies."""
    if mass.device.type == "cpu":
        return mass.cumsum(0)
    lines = pad(mass, (0, -len(mass) % LINE)).view(-1, LINE).cumsum(1)
    before = lines[:, -1].cpu().cumsum(0).to(mass.device)
    lines[1:] += before[:-1, None]
    return lines.flatten()[: len(mass)]


def _means(vectors: Tensor, weights: Tensor, indices: Tensor, errors: Tensor, centroids: Tensor) -> Tensor:
    """Weighted means of the clusters; an empty cluster moves onto one of the worst served vectors."""
    k = centroids.shape[0]
    mass = add_by_index(vectors.new_zeros(k, dtype=torch.float64), indices, weights.double())
    sums = vectors.new_zeros(k, vectors.shape[1], dtype=torch.float64)
    add_by_index(sums, indices, (vectors * weights[:, None]).double())
    means = torch.where(mass[:, None] > 0, sums / mass.clamp(min=1e-300)[:, None], centroids.double()).float()
    empty = (mass == 0).nonzero()[:, 0]
    if len(empty):
        worst = errors.topk(min(len(empty), len(errors))).indices
        means[empty[: len(worst)]] = vectors[worst]
    return means
