"""Index assignment under the full Hessian, one input column at a time.

`feedback_pass` is VPTQ's channel-independent second-order optimization (arXiv 2409.17066, section 3.1, algorithm 1): a
column takes its nearest centroids, and its error is spread over the columns still to come through U, the upper Cholesky
factor of H^-1. Rows do not interact under tr(E H E^T), so nearest means Euclidean nearest within a column.

`descent_sweep` is what the paper lacks. The first pass sees only the columns behind it. With every other column fixed
the loss is H_jj |target_j - q_j|^2 plus a constant, where target_j = q_j + (H E)_j / H_jj, so choosing the nearest
centroid of target_j is the exact minimum over column j and a sweep can only lower the loss.

Both work in lazy blocks (GPTQ, arXiv 2210.17323, section 3.3): inside a block the updates are rank one, behind it one
matrix product. The block size changes the order of the sums and nothing else.

    columns      | done | p | rest of block | columns behind the block          |
    inside             read   rank-1 update
    after a block                             one matrix product with all errors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vptq.quantize.segments import Segment

Beam = Callable[[Segment], int]


def feedback_pass(
    columns: Tensor, factor: Tensor, segments: Sequence[Segment], beam_for: Beam, block_size: int
) -> Tensor:
    """Sets every segment's indices; the error of each column is fed forward.

    Args:
        columns: [in_features, out_features] float32, the weight in quantized order; not changed.
        factor: [in_features, in_features] float32, upper triangular, U^T U = H^-1.
        segments: cover all columns in order and hold `indices` of the right shapes; those are overwritten.
        beam_for: how many main candidates to try in a segment.
        block_size: columns handled between two matrix products.

    Returns:
        [in_features, out_features], the decoded columns.
    """
    work = columns.clone()
    decoded = torch.empty_like(columns)
    for start, stop in _blocks(len(columns), block_size):
        errors = torch.empty_like(work[start:stop])
        for p, segment in _columns(segments, start, stop):
            decoded[p] = segment.assign_column(p, work[p], beam_for(segment))
            errors[p - start] = (work[p] - decoded[p]) / factor[p, p]
            work[p + 1 : stop].addr_(factor[p, p + 1 : stop], errors[p - start], alpha=-1.0)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
    return decoded


def descent_sweep(
    columns: Tensor, hessian: Tensor, segments: Sequence[Segment], decoded: Tensor, beam_for: Beam, block_size: int
) -> Tensor:
    """One cyclic pass of exact coordinate descent over the columns; the loss does not rise.

    Args:
        columns: [in_features, out_features] float32, the weight in quantized order.
        hessian: [in_features, in_features] float32 with a positive diagonal.
        segments: hold the indices to improve; those are changed in place.
        decoded: what the indices decode to now.
        beam_for: as in `feedback_pass`.
        block_size: as in `feedback_pass`.

    Returns:
        The decoded columns afterwards.
    """
    decoded = decoded.clone()
    pull = hessian @ (columns - decoded)  # row j: (H E)_j, minus half the gradient of the loss by column j
    for start, stop in _blocks(len(columns), block_size):
        steps = torch.empty_like(pull[start:stop])
        for p, segment in _columns(segments, start, stop):
            target = decoded[p] + pull[p] / hessian[p, p]
            value = segment.assign_column(p, target, beam_for(segment), keep_better=True)
            steps[p - start] = value - decoded[p]
            decoded[p] = value
            pull[p + 1 : stop].addr_(hessian[p, p + 1 : stop], steps[p - start], alpha=-1.0)
        pull[stop:].addmm_(hessian[start:stop, stop:].T, steps, alpha=-1.0)
    return decoded


def _blocks(count: int, block_size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, block_size):
        yield start, min(start + block_size, count)


def _columns(segments: Sequence[Segment], start: int, stop: int) -> Iterator[tuple[int, Segment]]:
    for segment in segments:
        for p in range(max(start, segment.start), min(stop, segment.stop)):
            yield p, segment
