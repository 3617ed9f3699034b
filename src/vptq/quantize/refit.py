"""Least squares under the full Hessian with the indices fixed: for the codebooks, and for the column normalization.

The decoded weight is linear in the centroids, so tr((W - W_hat) H (W - W_hat)^T) is a quadratic in them. Its normal
matrix has k x k entries and takes out/v x in^2 additions to fill; applying it costs a gather, one product with H and a
scatter, whatever k is. Conjugate gradients from the present centroids therefore fit 65,536 centroids as easily as 256,
and all codebooks of a layer (main, residual, outlier, every group) are fitted together. The published algorithm never
refits centroids after error feedback; AQLM (arXiv 2401.06118) and LNQ (arXiv 2505.07004) showed what that leaves.

The loss is a quadratic in scale and bias of the columns as well, of 2 x in_features unknowns, and is solved directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vptq.ops.scatter import add_by_index
from vptq.quantize.segments import Segment, decode_all, weigh_rows

Books = list[list[Tensor]]
"""Codebook-shaped tensors: for each segment, for each stage, [k, v]."""

CONVERGED = 1e-9
"""Share of the first residual's energy that ends a refit whatever the caller asks. Main and residual codebooks can
trade a constant, so the equations are singular: steps taken on rounding errors alone would run off along that
direction."""

AFFINE_RIDGE = 1e-4
"""Share of the mean diagonal added to the scale equations: two columns with nearly equal inputs would share it out at
will."""


def refit_codebooks(
    columns: Tensor, hessian: Tensor, segments: Sequence[Segment], iterations: int, tolerance: float = CONVERGED
) -> Tensor:
    """Moves every codebook towards its least-squares optimum; the loss does not rise, up to rounding.

    Args:
        columns: [in_features, out_features] float32, the weight in quantized order.
        hessian: [in_features, in_features] float32, symmetric, positive semidefinite; or its diagonal [in_features].
        segments: hold indices (read) and codebooks (replaced).
        iterations: conjugate-gradient steps at most.
        tolerance: stop when the (preconditioned) energy of the residual has fallen to this share.

    Returns:
        The decoded columns afterwards.
    """
    precondition = [[1.0 / mass.clamp(min=1e-20)[:, None] for mass in _masses(hessian, s)] for s in segments]
    rows = segments[0].rows
    residual = _scatter(_weigh(hessian, columns - decode_all(segments), rows), segments)
    direction = scaled = _zip(torch.mul, precondition, residual)
    energy = first = _dot(residual, scaled)
    for _ in range(iterations):
        image = _scatter(_weigh(hessian, _gather(direction, segments), rows), segments)
        curvature = _dot(direction, image)
        if not curvature > 0.0 or not energy > 0.0:
            break
        step = energy / curvature
        for segment, stages in zip(segments, _plus([s.stages for s in segments], step, direction), strict=True):
            segment.stages = stages
        residual = _plus(residual, -step, image)
        scaled = _zip(torch.mul, precondition, residual)
        following = _dot(residual, scaled)
        direction = _plus(scaled, following / energy, direction)
        energy = following
        if energy < max(tolerance, CONVERGED) * first:
            break
    return decode_all(segments)


def refit_normalization(columns: Tensor, hessian: Tensor, segments: Sequence[Segment], dtype: torch.dtype) -> Tensor:
    """Sets scale and shift of every column to their joint least-squares optimum, rounded to `dtype`.

    With Q the gathered centroids: for given scales s the best shift of a column is mean(W) - s mean(Q), whatever H is;
    what is left is (H * Q Q^T) s = (H * Q W^T) 1 for the centered Q and W. Means and products are over the rows, each
    as much as it counts.

    Args:
        columns: [in_features, out_features] float32, the weight in quantized order.
        hessian: [in_features, in_features] float32, symmetric, positive semidefinite.
        segments: hold indices and codebooks (read), scale and shift (replaced).
        dtype: what scale and shift will be stored in.

    Returns:
        The decoded columns afterwards.
    """
    gathered = torch.cat([segment.gather(segment.stages) for segment in segments])
    counts = torch.ones_like(columns[0]) if segments[0].rows is None else segments[0].rows
    shares = counts / counts.sum()
    means, target_means = gathered @ shares, columns @ shares
    centered, target = gathered - means[:, None], columns - target_means[:, None]
    scale = torch.cat([segment.scale for segment in segments])
    weighed = centered * counts
    matrix = hessian * (weighed @ centered.T)
    pull = (hessian * (weighed @ (target - scale[:, None] * centered).T)).sum(1)
    matrix.diagonal().add_(AFFINE_RIDGE * matrix.diagonal().mean().clamp(min=1e-20))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) == 0:
        moved = (scale + torch.cholesky_solve(pull[:, None], factor)[:, 0]).to(dtype).float()
        usable = torch.isfinite(moved) & (moved.abs() > 1e-3 * scale.abs())  # a scale of zero would lose its column
        scale = torch.where(usable, moved, scale)
    shift = (target_means - scale * means).to(dtype).float()
    for segment in segments:
        segment.scale, segment.shift = scale[segment.start : segment.stop], shift[segment.start : segment.stop]
    return decode_all(segments)


def _weigh(hessian: Tensor, columns: Tensor, rows: Tensor | None) -> Tensor:
    columns = weigh_rows(columns, rows)
    return hessian @ columns if hessian.dim() == 2 else hessian[:, None] * columns


def _masses(hessian: Tensor, segment: Segment) -> list[Tensor]:
    """For each stage [k]: the Hessian diagonal summed over the vectors that use a centroid (Jacobi preconditioner)."""
    diagonal = hessian.diagonal() if hessian.dim() == 2 else hessian
    weights = diagonal[segment.start : segment.stop] * segment.scale.square()
    spread = (weights[:, None] * segment.vector_weights).reshape(-1)
    return [
        add_by_index(spread.new_zeros(len(book)), indices.flatten(), spread)
        for book, indices in zip(segment.stages, segment.indices, strict=True)
    ]


def _gather(books: Books, segments: Sequence[Segment]) -> Tensor:
    """Codebook space -> weight space, [in_features, out_features]."""
    pairs = zip(segments, books, strict=True)
    return torch.cat([segment.gather(stages) * segment.scale[:, None] for segment, stages in pairs])


def _scatter(columns: Tensor, segments: Sequence[Segment]) -> Books:
    """The transpose of `_gather`: each centroid collects the rows of the vectors that use it."""
    books = []
    for segment in segments:
        vectors = segment.cut(columns[segment.start : segment.stop] * segment.scale[:, None])
        books.append(
            [
                add_by_index(torch.zeros_like(book), index.flatten(), vectors)
                for book, index in zip(segment.stages, segment.indices, strict=True)
            ]
        )
    return books


def _zip(function: Callable[[Tensor, Tensor], Tensor], left: Books, right: Books) -> Books:
    return [[function(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(left, right, strict=True)]


def _plus(left: Books, factor: float, right: Books) -> Books:
    return _zip(lambda a, b: a + factor * b, left, right)


def _dot(left: Books, right: Books) -> float:
    products = _zip(torch.mul, left, right)
    sums = [product.sum(dtype=torch.float64) for stages in products for product in stages]
    return float(torch.stack(sums).sum())  # one wait for a GPU, not one a codebook
