"""Runs of columns that share a codebook, and the choice of centroids for their vectors.

The solver keeps a weight transposed, as `columns` [in_features, out_features] in quantized order, because every step of
it works on one input column at a time and a column is then contiguous. Outlier columns and each column group are one
`Segment`: they differ in vector length and codebooks and in nothing else, so no other module knows about either.

The column normalization lives here too. Columns and Hessian stay in the units of the weight; a segment maps a column to
the units of its codebook and back. Choosing centroids for (w - b) / s and weighing the error of W with H is the same as
weighing the error of the normalized weight with diag(s) H diag(s), and cannot be forgotten anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from vptq.ops import nearest

PRODUCT_LIMIT = 8192
"""Up to so many pairs of main and residual centroids, their sums are searched as one codebook. That is exact, and
solving SmolLM2's 20.gate_proj at v4-k64-64 went from 31 s with a beam of 64 to 5.6 s."""

BEAM_ELEMENTS = 1 << 24
"""Numbers in what a beam leaves of the vectors it is tried on (64 MB); all vectors of a 4096 x 11008 layer at once
would take 6 GB."""


@dataclass
class Segment:
    """Columns `start`..`stop` of a weight with `out_features` rows, cut into vectors of `vector_len` rows.

    Attributes:
        scale: [columns] float32, positive; 1 without normalization.
        shift: [columns] float32; 0 without normalization.
        stages: the codebooks, each [k, vector_len]: one, or main and residual.
        indices: for each stage [columns, vectors] int64, which centroid a vector takes.
    """

    start: int
    stop: int
    vector_len: int
    out_features: int
    scale: Tensor
    shift: Tensor
    stages: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)

    @property
    def vectors_per_column(self) -> int:
        """R, the last one padded where the rows do not divide."""
        return -(-self.out_features // self.vector_len)

    def cut(self, columns: Tensor) -> Tensor:
        """[n, out_features] -> [n * vectors_per_column, vector_len]; the last vector is padded with zeros."""
        missing = self.vectors_per_column * self.vector_len - self.out_features
        padded = pad(columns, (0, missing)) if missing else columns
        return padded.reshape(-1, self.vector_len)

    def join(self, vectors: Tensor) -> Tensor:
        """The reverse of `cut`: padding rows are dropped."""
        return vectors.reshape(-1, self.vectors_per_column * self.vector_len)[:, : self.out_features]

    def normalized(self, columns: Tensor) -> Tensor:
        """This segment's columns in the units of its codebook, as vectors."""
        return self.cut((columns[self.start : self.stop] - self.shift[:, None]) / self.scale[:, None])

    def gather(self, stages: Sequence[Tensor]) -> Tensor:
        """[columns, out_features]: the sums of the entries of `stages` that the indices choose, not yet scaled."""
        total = stages[0][self.indices[0].flatten()]
        for codebook, indices in zip(stages[1:], self.indices[1:], strict=True):
            total = total + codebook[indices.flatten()]
        return self.join(total)

    def decode(self) -> Tensor:
        """[columns, out_features]: what the indices stand for, in the units of the weight."""
        return self.gather(self.stages) * self.scale[:, None] + self.shift[:, None]

    def assign(self, columns: Tensor, beam: int) -> None:
        """Every vector of this segment takes its nearest centroids, without regard to other columns."""
        chosen, _ = self._nearest(self.normalized(columns), beam)
        self.indices = [index.view(self.stop - self.start, -1) for index in chosen]

    def assign_column(self, p: int, target: Tensor, beam: int, *, keep_better: bool = False) -> Tensor:
        """Column `p` (in quantized order) takes the centroids nearest to `target` [out_features].

        Args:
            p: the column.
            target: in the units of the weight.
            beam: main candidates tried when there is a residual codebook.
            keep_better: a vector whose present centroids are at least as near as the ones found keeps them. Only a beam
                narrower than the main codebook can find worse ones.

        Returns:
            [out_features], the decoded column.
        """
        at = p - self.start
        vectors = self.cut(((target - self.shift[at]) / self.scale[at])[None])
        chosen, values = self._nearest(vectors, beam)
        if keep_better and not _exact(self.stages, beam):
            now = [stored[at] for stored in self.indices]
            present = self.stages[0][now[0]] + self.stages[1][now[1]]
            worse = self._error(vectors - values) >= self._error(vectors - present)
            values = torch.where(worse[:, None], present, values)
            chosen = [torch.where(worse, old, new) for old, new in zip(now, chosen, strict=True)]
        for stored, index in zip(self.indices, chosen, strict=True):
            stored[at] = index
        return self.join(values)[0] * self.scale[at] + self.shift[at]

    def _nearest(self, vectors: Tensor, beam: int) -> tuple[list[Tensor], Tensor]:
        """`assign`, except that the padding of a column's last vector has no say in its choice."""
        chosen, values = assign(vectors, self.stages, beam)
        rows = self.out_features % self.vector_len
        if rows:
            last = slice(self.vectors_per_column - 1, None, self.vectors_per_column)
            books = [book[:, :rows].contiguous() for book in self.stages]
            tail, _ = assign(vectors[last, :rows].contiguous(), books, beam)
            for index, part in zip(chosen, tail, strict=True):
                index[last] = part
            values[last] = sum(book[part] for book, part in zip(self.stages, tail, strict=True))
        return chosen, values

    def _error(self, difference: Tensor) -> Tensor:
        """Squared length of each vector of one column, without its padding."""
        return self.cut(self.join(difference)).square().sum(1)


def assign(vectors: Tensor, stages: Sequence[Tensor], beam: int) -> tuple[list[Tensor], Tensor]:
    """Centroids whose sum is nearest to each vector.

    With two stages every one of the `beam` nearest main centroids is tried with its best residual centroid; beam=1 is
    the greedy choice of the published code, beam=k is exact.

    Args:
        vectors: [N, v] float32.
        stages: one or two codebooks [k, v].
        beam: main candidates for each vector when there are two stages.

    Returns:
        One index tensor [N] int64 a stage, and the chosen sums [N, v].
    """
    if len(stages) == 1:
        index = nearest(vectors, stages[0])[0][:, 0]
        return [index], stages[0][index]
    main, residual = stages
    if _exact(stages, beam):
        pair = nearest(vectors, (main[:, None] + residual).flatten(0, 1))[0][:, 0]
        index, partner_index = pair // len(residual), pair % len(residual)
        return [index, partner_index], main[index] + residual[partner_index]
    beam = min(beam, len(main))
    step = max(1, BEAM_ELEMENTS // (beam * vectors.shape[1]))
    pairs = [_best_pairs(part, main, residual, beam) for part in vectors.split(step)]  # type: ignore[no-untyped-call]
    index, partner_index = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return [index, partner_index], main[index] + residual[partner_index]


def _best_pairs(vectors: Tensor, main: Tensor, residual: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    candidates = nearest(vectors, main, beam)[0]
    rest = vectors[:, None] - main[candidates]
    partner, distance = nearest(rest.flatten(0, 1), residual)
    best = distance.view(candidates.shape).argmin(dim=1, keepdim=True)
    return candidates.gather(1, best)[:, 0], partner.view(candidates.shape).gather(1, best)[:, 0]


def _exact(stages: Sequence[Tensor], beam: int) -> bool:
    """Whether `assign` surely finds the nearest sum: one codebook, or two whose sums are few enough to list."""
    return len(stages) == 1 or (beam > 1 and len(stages[0]) * len(stages[1]) <= PRODUCT_LIMIT)


def decode_all(segments: Sequence[Segment]) -> Tensor:
    """[in_features, out_features]: every segment's columns, in quantized order."""
    return torch.cat([segment.decode() for segment in segments])
