"""Specs a layer may be given, what each stores, and how much worse or better than another it will be.

Solving every layer with every candidate would take days. What a codebook loses on a Gaussian source ranks them as well:
a layer's own statistics (its Hessian, its tails) move the losses of all candidates by nearly the same factor
(docs/algorithm.md has the measurement), so that one measured candidate gives the others by the ratio in this table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vptq.config import LayerConfig
from vptq.spec import QuantSpec

GAUSSIAN_LOSS = {
    "v4-k16": 0.3465,
    "v8-k256": 0.3207,
    "v12-k4096": 0.3034,
    "v6-k256": 0.2172,
    "v12-k256-256": 0.2003,
    "v4-k64": 0.1862,
    "v8-k64-64": 0.1758,
    "v8-k4096": 0.1649,
    "v8-k128-128": 0.1261,
    "v4-k256": 0.0976,
    "v6-k64-64": 0.0979,
    "v8-k256-256": 0.0895,
    "v6-k4096": 0.0887,
    "v8-k65536": 0.0831,
    "v8-k512-512": 0.0638,
    "v6-k128-128": 0.0629,
    "v4-k32-32": 0.0569,
    "v8-k4096-256": 0.0454,
    "v8-k1024-1024": 0.0453,
    "v6-k256-256": 0.0400,
    "v4-k64-64": 0.0299,
    "v8-k4096-4096": 0.0238,
    "v8-k65536-256": 0.0229,
    "v4-k128-128": 0.0155,
    "v8-k65536-4096": 0.0120,
    "v4-k256-256": 0.0079,
    "v6-k4096-4096": 0.0067,
}
"""Spec -> tr(E E^T) / tr(W W^T) for a Gaussian weight of any size, solved with H = I by this package; the three with
65,536 entries are extrapolated from those with 4096. From finite weights by way of `OVERFIT`."""

OVERFIT = 4.0
"""What a codebook fits of the very vectors it is made for: with x entries a vector the loss is 1 / (1 + OVERFIT x) of
that in the table (Gaussian weights, five specs, x from 1/256 to 1/8: within 5%)."""

SMALLEST = "v4-k16"
REFERENCE_BITS = 2.0
MIN_VECTORS_PER_CENTROID = 16
"""A codebook of fewer is larger than the indices it could save: 16 / 16 = 1 bit a weight."""


@dataclass(frozen=True)
class Candidate:
    """One spec for one layer.

    Attributes:
        spec: The spec.
        config: What it makes of the layer.
        gaussian_loss: Its loss on a Gaussian weight of this size; only ratios within a layer mean anything.
    """

    spec: QuantSpec
    config: LayerConfig
    gaussian_loss: float


def candidates_for(
    in_features: int, out_features: int, *, norm: bool, perm: bool, perm_is_stored: bool, bias: bool = False
) -> list[Candidate]:
    """The specs whose codebooks are worth their bits for a layer of this size, coarsest first; at least one.

    Args:
        in_features: The layer's width.
        out_features: Its height.
        norm: As `QuantSpec.enable_norm`.
        perm: As `QuantSpec.enable_perm`.
        perm_is_stored: Whether a permutation takes bits; not when `absorb_perm` folds it into the indices.
        bias: The layer has one.
    """
    found = []
    for name, loss in GAUSSIAN_LOSS.items():
        spec = dataclasses.replace(QuantSpec.parse(name), enable_norm=norm, enable_perm=perm)
        config = spec.for_layer(in_features, out_features, bias)
        vectors = config.num_vectors * in_features
        entries = max(spec.num_centroids, spec.num_residual_centroids)
        if name == SMALLEST or vectors >= MIN_VECTORS_PER_CENTROID * entries:
            share = (spec.num_centroids + spec.num_residual_centroids) / vectors
            config = dataclasses.replace(config, enable_perm=perm and perm_is_stored)
            found.append(Candidate(spec, config, loss / (1.0 + OVERFIT * share)))
    return found


def reference_of(candidates: list[Candidate]) -> Candidate:
    """The candidate a layer is measured with: the one nearest to 2 index bits, where errors are neither lost in noise
    nor so large that they leave the range where divergence grows with their square."""
    return min(candidates, key=lambda candidate: abs(candidate.spec.index_bits_per_weight - REFERENCE_BITS))
