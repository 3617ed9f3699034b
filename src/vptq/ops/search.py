"""`vptq::nearest` in PyTorch, for every device: exact nearest centroids without the distance matrix.

A matrix multiplication ranks the centroids by s(c) = |c|^2 / 2 - x.c, which orders them as |x - c|^2 does but loses
digits to cancellation. So the ranking only proposes: a centroid that the multiplication's rounding error could have
put in the wrong place sends its vector to a second look, where the distances are summed directly. Such vectors are
rare (equal or nearly equal centroids), so the cost is the multiplication's, and the answer is that of the direct sum,
whatever the blocking of the multiplication or the number of threads: the same input gives the same indices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.errors import ConfigError
from vptq.ops.schemas import LIBRARY

_SCORES_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
_FLOAT32_ROUNDOFF = 2.0**-24
_REDUCED_ROUNDOFF = 2.0**-8  # what float32 multiplications may use when reduced precision is allowed (bfloat16)


def nearest(vectors: Tensor, codebook: Tensor, beam: int = 1) -> tuple[Tensor, Tensor]:
    """The `beam` nearest centroids of every vector; see `vptq.ops.nearest`."""
    check(vectors, codebook, beam)
    count, centroids = vectors.shape[0], codebook.shape[0]
    indices = vectors.new_empty((count, beam), dtype=torch.int64)
    distances = vectors.new_empty((count, beam))
    # Distances do not change under translation; around the codebook's mean the products, and their errors, are small.
    center = codebook.mean(dim=0)
    table = (codebook - center).t().contiguous()
    half_norms = table.square().sum(dim=0) / 2
    chunk = max(1, _SCORES_PER_CHUNK.get(vectors.device.type, 1 << 24) // centroids)
    for first in range(0, count, chunk):
        part = slice(first, first + chunk)
        scores = torch.addmm(half_norms, vectors[part] - center, table, alpha=-1)
        indices[part], distances[part] = _rank(vectors[part], codebook, center, scores, beam)
    return indices, distances


def _rank(vectors: Tensor, codebook: Tensor, center: Tensor, scores: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    if beam == 1:
        best, proposed = scores.min(dim=1, keepdim=True)
    else:
        top = scores.topk(beam, dim=1, largest=False)
        best, proposed = top.values, top.indices
    indices, distances = _sorted_by_distance(proposed, _distances(vectors, codebook[proposed]))

    margin = _margin(vectors - center, distances[:, -1])
    runner_up = scores.scatter_(1, proposed, torch.inf).amin(dim=1)
    # Put so that NaN, on either side, is unsure: the second look sorts it last.
    unsure = (~(runner_up > best.amax(dim=1) + margin)).nonzero().squeeze(1)
    step = max(1, _SCORES_PER_CHUNK["cpu"] // codebook.numel())
    for first in range(0, len(unsure), step):
        rows = unsure[first : first + step]
        every = _distances(vectors[rows], codebook.unsqueeze(0))
        indices[rows], distances[rows] = _first_smallest(every, beam)
    return indices, distances


def _distances(vectors: Tensor, candidates: Tensor) -> Tensor:
    """|x - c|^2 [n, k] of vectors [n, v] to candidates [n or 1, k, v], summed in the order of the elements."""
    total = (vectors[:, None, 0] - candidates[..., 0]).square()
    for element in range(1, vectors.shape[1]):
        total += (vectors[:, None, element] - candidates[..., element]).square()
    return total


def _margin(centered: Tensor, farthest: Tensor) -> Tensor:
    """How far rounding can move two scores apart, for centroids about as near as the farthest one proposed.

    A dot product of v terms errs by at most v u |x| |c|, u the unit roundoff; the half norm likewise. A centroid that
    contends lies within the distance found, so |c| <= |x| + distance. Centering errs by another u in each factor.
    """
    exact = torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    roundoff = _FLOAT32_ROUNDOFF if exact else _REDUCED_ROUNDOFF
    norm = centered.square().sum(dim=1).sqrt()
    reach = norm + farthest.sqrt()
    return 2 * (centered.shape[1] + 6) * roundoff * (norm * reach + reach.square() / 2)


def _sorted_by_distance(indices: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates by rising distance, equal distances by rising index."""
    indices, order = indices.sort(dim=1)
    distances, by_distance = distances.gather(1, order).sort(dim=1, stable=True)
    return indices.gather(1, by_distance), distances


def _first_smallest(distances: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    values, order = distances.sort(dim=1, stable=True)
    return order[:, :beam], values[:, :beam]


def check(vectors: Tensor, codebook: Tensor, beam: int) -> None:
    """Raises ConfigError where shapes, dtypes or `beam` do not fit."""
    if vectors.dim() != 2 or codebook.dim() != 2 or vectors.shape[1] != codebook.shape[1] or vectors.shape[1] < 1:
        raise ConfigError(
            f"vectors {tuple(vectors.shape)} and codebook {tuple(codebook.shape)} must be two matrices of one width"
        )
    if vectors.dtype != torch.float32 or codebook.dtype != torch.float32:
        raise ConfigError(f"vectors are {vectors.dtype}, the codebook {codebook.dtype}; both must be float32")
    if not 1 <= beam <= codebook.shape[0]:
        raise ConfigError(f"beam is {beam}; it must be in 1..{codebook.shape[0]}, the number of centroids")


LIBRARY.impl("nearest", nearest, "CompositeExplicitAutograd")
