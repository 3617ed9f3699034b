"""Index assignment under the full Hessian, one input column at a time.

`feedback_pass` is VPTQ's channel-independent second-order optimization (arXiv 2409.17066, section 3.1, algorithm 1): a
column takes its nearest centroids, and its error is spread over the columns still to come through U, the upper Cholesky
factor of H^-1. Rows do not interact under tr(E H E^T), so nearest means Euclidean nearest within a column.

`descent_sweep` is what the paper lacks. The first pass sees only the columns behind it. With every other column fixed
the loss is H_jj |target_j - q_j|^2 plus a constant, where target_j = q_j + (H E)_j / H_jj, so choosing the nearest
centroid of target_j is the exact minimum over column j and a sweep can only lower the loss.

Both are `ops.assign_columns` with a coupling of their own, in lazy blocks (GPTQ, arXiv 2210.17323, section 3.3): that
operator carries the errors from column to column inside a block, one matrix product carries them to the columns behind
it. The block size changes the order of the sums and nothing else.
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
    feedback = factor / factor.diagonal()[:, None]  # row q: what a unit error of column q asks of those behind it
    for segment, start, stop in _blocks(segments, block_size):
        coupling = feedback[start:stop, start:stop].T
        beam = beam_for(segment)
        decoded[start:stop], errors = segment.assign_columns(start, stop, work[start:stop], coupling, beam)
        work[stop:].addmm_(feedback[start:stop, stop:].T, errors)
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
    for segment, start, stop in _blocks(segments, block_size):
        at = slice(start, stop)
        diagonal = hessian.diagonal()[at, None]
        base, coupling = decoded[at] + pull[at] / diagonal, -hessian[at, at] / diagonal
        decoded[at], steps = segment.assign_columns(start, stop, base, coupling, beam_for(segment), decoded[at])
        pull[stop:].addmm_(hessian[at, stop:].T, steps, alpha=-1.0)
    return decoded


def _blocks(segments: Sequence[Segment], size: int) -> Iterator[tuple[Segment, int, int]]:
    for segment in segments:
        for start in range(segment.start, segment.stop, size):
            yield segment, start, min(start + size, segment.stop)
