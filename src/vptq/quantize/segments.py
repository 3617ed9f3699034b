"""Runs of columns that share a codebook, and the choice of centroids for their vectors.

The solver keeps a weight transposed, as `columns` [in_features, out_features] in quantized order, because every step of
it works on one input column at a time and a column is then contiguous. Outlier columns and each column group are one
`Segment`: they differ in vector length and codebooks and in nothing else, so no other module knows about either.

The column normalization lives here too. Columns and Hessian stay in the units of the weight; a segment maps a column to
the units of its codebook and back. Choosing centroids for (w - b) / s and weighing the error of W with H is the same as
weighing the error of the normalized weight with diag(s) H diag(s), and cannot be forgotten anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vptq.ops import assign_columns
from vptq.ops.columns import cut, join
from vptq.weight import QuantizedWeight


@dataclass
class Segment:
    """Columns `start`..`stop` of a weight with `out_features` rows, cut into vectors of `vector_len` rows.

    Attributes:
        scale: [columns] float32, positive; 1 without normalization.
        shift: [columns] float32; 0 without normalization.
        stages: the codebooks, each [k, vector_len]: one, or main and residual.
        indices: for each stage [columns, vectors] int64, which centroid a vector takes; changed in place.
        rows: [out_features] float32, what the error of a row counts; None where all count alike.
    """

    start: int
    stop: int
    vector_len: int
    out_features: int
    scale: Tensor
    shift: Tensor
    stages: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    rows: Tensor | None = None

    @property
    def vectors_per_column(self) -> int:
        """R, the last one padded where the rows do not divide."""
        return -(-self.out_features // self.vector_len)

    @property
    def vector_weights(self) -> Tensor:
        """[vectors]: what a vector of any column counts, the mean of its rows."""
        if self.rows is None:
            return torch.ones(self.vectors_per_column, device=self.scale.device)
        inside = self.cut(torch.ones_like(self.rows)[None]).sum(1)
        return self.cut(self.rows[None]).sum(1) / inside

    def parts(self, columns: int) -> Iterator[Segment]:
        """The same columns in runs of so many, in turn."""
        for start in range(0, self.stop - self.start, columns):
            at = slice(start, min(start + columns, self.stop - self.start))
            yield Segment(
                self.start + at.start, self.start + at.stop, self.vector_len, self.out_features, self.scale[at],
                self.shift[at], self.stages, [index[at] for index in self.indices], self.rows,
            )  # fmt: skip

    def cut(self, columns: Tensor) -> Tensor:
        """[n, out_features] -> [n * vectors_per_column, vector_len]; the last vector is padded with zeros."""
        return cut(columns, self.vector_len)

    def join(self, vectors: Tensor) -> Tensor:
        """The reverse of `cut`: padding rows are dropped."""
        return join(vectors, self.out_features)

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

    def make_indices(self) -> None:
        """Room for the indices, which say nothing yet."""
        shape = (self.stop - self.start, self.vectors_per_column)
        self.indices = [torch.empty(shape, dtype=torch.int64, device=self.scale.device) for _ in self.stages]

    def assign(self, columns: Tensor, beam: int) -> None:
        """Every vector of this segment takes its nearest centroids, without regard to other columns."""
        self.make_indices()
        self.assign_columns(self.start, self.stop, columns[self.start : self.stop], None, beam)

    def assign_columns(
        self,
        start: int,
        stop: int,
        base: Tensor,
        coupling: Tensor | None,
        beam: int,
        present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Columns `start`..`stop` (in quantized order) take new centroids; see `vptq.ops.assign_columns`.

        Args:
            start: the first column, within this segment.
            stop: behind the last one.
            base: [stop - start, out_features], in the units of the weight, as all that follows.
            coupling: [stop - start, stop - start], what the error of one column adds to the target of a later one.
            beam: main candidates tried when there is a residual codebook.
            present: what the indices stand for now; centroids that are no nearer do not replace them.

        Returns:
            Values and errors, [stop - start, out_features].
        """
        at = slice(start - self.start, stop - self.start)
        main, *residual = self.stages
        indices, *residual_indices = (stage[at] for stage in self.indices)
        return assign_columns(
            base,
            coupling,
            present,
            self.scale[at],
            self.shift[at],
            main,
            residual[0] if residual else None,
            indices,
            residual_indices[0] if residual else None,
            beam,
            self.rows,
        )


def segments_of(weight: QuantizedWeight) -> list[Segment]:
    """The runs of columns of a quantized weight, in quantized order; their indices are views of the weight's."""
    runs = [([book], [indices]) for book, indices in zip(weight.codebook, weight.indices, strict=True)]
    if weight.residual_codebook is not None and weight.residual_indices is not None:
        for run, book, indices in zip(runs, weight.residual_codebook, weight.residual_indices, strict=True):
            run[0].append(book)
            run[1].append(indices)
    if weight.outlier_codebook is not None and weight.outlier_indices is not None:
        runs.insert(0, ([weight.outlier_codebook], [weight.outlier_indices]))

    width, device = weight.config.in_features, weight.codebook.device
    order = torch.arange(width, device=device) if weight.perm is None else weight.perm
    scale, shift = torch.ones(width, device=device), torch.zeros(width, device=device)
    if weight.weight_scale is not None and weight.weight_bias is not None:
        scale, shift = weight.weight_scale.float()[order], weight.weight_bias.float()[order]
    segments, start = [], 0
    for books, stages in runs:
        at = slice(start, start + stages[0].shape[1])
        segments.append(
            Segment(
                at.start, at.stop, books[0].shape[1], weight.config.out_features, scale[at], shift[at],
                [book.float() for book in books], [indices.T for indices in stages],
            )
        )  # fmt: skip
        start = at.stop
    return segments


def weigh_rows(columns: Tensor, rows: Tensor | None) -> Tensor:
    """Columns [n, out_features], each row as much as it counts."""
    return columns if rows is None else columns * rows


def decode_all(segments: Sequence[Segment]) -> Tensor:
    """[in_features, out_features]: every segment's columns, in quantized order."""
    return torch.cat([segment.decode() for segment in segments])
