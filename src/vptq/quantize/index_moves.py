"""Other centroids for the vectors of a quantized weight, where the gradient of the loss asks for them.

Finetuning moves what an index names; here the index itself moves, as in PV-tuning (arXiv 2405.14852). A vector looks
for the centroids nearest to where the gradient would take it, somewhat less than halfway to a typical next one: most
find themselves, and those that do not have another centroid near and nearly where the gradient points. Of these few
move at a time, because the gradient speaks for small changes only.

Nothing here knows of models, files or training: a weight and its gradient in, moves out (`move_turns.py` does the
rest).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LayerConfig
from vptq.ops import nearest
from vptq.quantize.segments import Segment, segments_of
from vptq.quantize.solver import SolverConfig
from vptq.weight import QuantizedWeight

WEIGHTS_AT_ONCE = 1 << 24
"""Weights whose vectors are searched together: it bounds the temporaries of a large layer."""

STEP = 0.4
"""How far along the gradient to look for other centroids, in typical distances from one to the next: 0.35 to 0.5 lowers
the divergence on text that was not used, 1 multiplies it (docs/log.md)."""

SPACING_SAMPLE, SPACING_BEAM = 1024, 64
"""Vectors that say how far it is to the next one, and main entries near each that are tried with all residual ones."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Moves:
    """Vectors of one weight and the centroids they would take, the most promising first.

    Attributes:
        vectors: [n] int64, numbers of vectors: column by column in quantized order, down each column.
        indices: for each stage [n] int64, what they would take; outlier columns have one stage and ignore the second.
        gains: [n] float32, positive: how much the loss falls by each move, to first order.
        scores: [n] float32, falling: gain over squared change of the weight, half the curvature that a move withstands.
    """

    vectors: Tensor
    indices: Sequence[Tensor]
    gains: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def best(self, count: int) -> Moves:
        """The most promising ones, those first; of equal ones the first vectors."""
        order = self.scores.argsort(descending=True, stable=True)[:count]
        return Moves(self.vectors[order], [i[order] for i in self.indices], self.gains[order], self.scores[order])


def vectors_of(config: LayerConfig) -> int:
    """How many vectors a layer has, those of its outlier columns included."""
    return config.num_groups * config.num_vectors * config.group_size + config.num_outlier_vectors * config.outlier_size


def propose(weight: QuantizedWeight, gradient: Tensor, limit: int) -> Moves:
    """The most promising moves of a weight.

    Args:
        weight: not changed.
        gradient: [out_features, in_features] float32, of the loss by the dense weight.
        limit: moves at most.
    """
    columns = gradient.T if weight.perm is None else gradient.T[weight.perm]
    found, first = [], 0
    for segment in segments_of(weight):
        spacing = spacing_of(segment)
        for part in segment.parts(max(1, WEIGHTS_AT_ONCE // segment.out_features)):
            found.append(_propose_in(part, columns[part.start : part.stop], spacing, first).best(limit))
            first += (part.stop - part.start) * part.vectors_per_column
    return _joined(found).best(limit)


def best_of(proposals: Mapping[str, Moves], count: int) -> dict[str, Moves]:
    """The most promising of the moves of several weights, `count` of them where there are so many."""
    sizes = torch.tensor([len(moves) for moves in proposals.values()])
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    scores = torch.cat([moves.scores.cpu() for moves in proposals.values()])
    chosen = scores.argsort(descending=True, stable=True)[:count]
    counts = owners[chosen].bincount(minlength=len(sizes)).tolist()
    return {name: moves.best(size) for (name, moves), size in zip(proposals.items(), counts, strict=True)}


def move(weight: QuantizedWeight, moves: Moves) -> None:
    """Gives some vectors of `weight` other centroids; its indices are changed in place."""
    first = 0
    for segment in segments_of(weight):
        height = segment.vectors_per_column
        last = first + (segment.stop - segment.start) * height
        mine = (first <= moves.vectors) & (moves.vectors < last)
        local = moves.vectors[mine] - first
        for stage, new in zip(segment.indices, moves.indices, strict=False):
            stage[local // height, local % height] = new[mine]
        first = last


def differing(weight: QuantizedWeight, other: QuantizedWeight) -> int:
    """How many vectors of two weights of one config have different indices."""
    count = 0
    for one, two in zip(segments_of(weight), segments_of(other), strict=True):
        pairs = zip(one.indices, two.indices, strict=True)
        count += int(torch.stack([a != b for a, b in pairs]).any(0).sum())
    return count


def spacing_of(segment: Segment) -> float:
    """How far a vector typically is from the next one that its codebooks can form; 0 where they form one only."""
    main, *residual = segment.stages
    step = -(-segment.indices[0].numel() // SPACING_SAMPLE)
    used = [index.flatten()[::step] for index in segment.indices]
    vectors = torch.stack([book[at] for book, at in zip(segment.stages, used, strict=True)]).sum(0)
    if residual:
        near = nearest(vectors, main, min(SPACING_BEAM, len(main)))[0]
        left = (vectors[:, None] - main[near]).flatten(0, 1)
        distances = nearest(left, residual[0], min(2, len(residual[0])))[1].view(len(vectors), -1)
    else:
        distances = nearest(vectors, main, min(2, len(main)))[1]
    if distances.shape[1] < 2:
        return 0.0
    return float(distances.sort(dim=1).values[:, 1].sqrt().median())  # the nearest is the vector itself


def _propose_in(segment: Segment, gradient: Tensor, spacing: float, first: int) -> Moves:
    """Every move in a run of columns that lowers the loss to first order, in no order.

    Args:
        segment: the columns.
        gradient: [columns, out_features].
        spacing: of the codebook, in its units.
        first: number of the first vector.
    """
    columns = segment.stop - segment.start
    one = torch.ones(columns, device=gradient.device)
    # The gradient by a value in the units of the codebook: steps are measured, and centroids sought, in those.
    pull = segment.cut(gradient * segment.scale[:, None])
    plain = dataclasses.replace(segment, start=0, stop=columns, scale=one, shift=torch.zeros_like(one))
    now = segment.cut(plain.decode())
    target = now - STEP * spacing * pull / pull.norm(dim=1, keepdim=True).clamp(min=_TINY)
    plain.assign(plain.join(target), SolverConfig().beam_for(plain))
    change = segment.cut(plain.decode()) - now
    gains = -(pull * change).sum(1)
    scores = gains / segment.cut(segment.join(change) * segment.scale[:, None]).square().sum(1).clamp(min=_TINY)
    useful = (gains > 0).nonzero()[:, 0]
    indices = [index.flatten()[useful] for index in plain.indices]
    return Moves(useful + first, indices, gains[useful], scores[useful])


def _joined(parts: Sequence[Moves]) -> Moves:
    stages = max(len(part.indices) for part in parts)
    return Moves(
        torch.cat([part.vectors for part in parts]),
        [torch.cat([part.indices[min(stage, len(part.indices) - 1)] for part in parts]) for stage in range(stages)],
        torch.cat([part.gains for part in parts]),
        torch.cat([part.scores for part in parts]),
    )
