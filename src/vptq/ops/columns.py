"""`vptq::assign_columns` in PyTorch, for every device: centroids for weight columns, one column after another.

Error feedback and coordinate descent are the same loop. A column's target is its base plus what the errors of the
columns before it ask for; it takes the centroids nearest to its target; its error goes on to the columns behind it.
They differ in what is coupled with what, which is the caller's matrix. Without one the columns stand alone.

Two codebooks are searched jointly: all pairs where they are few, otherwise every one of `beam` main centroids with its
best residual centroid. The C++ kernel does the same and lists more pairs.

Rows may count differently. With weights u a row, |x - c|^2 becomes sum u x^2 - 2 (u x) . c + u . c^2: as many products
again, which rank the centroids like the plain ones do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from vptq.errors import ConfigError
from vptq.ops.schemas import LIBRARY

PRODUCT_LIMIT = 8192
"""Up to so many pairs of main and residual centroids, their sums are searched as one codebook."""

BEAM_ELEMENTS = 1 << 24
"""Numbers in what a beam leaves of the vectors it is tried on (64 MB); all vectors of a 4096 x 11008 layer at once
would take 6 GB."""


def assign_columns(
    base: Tensor,
    coupling: Tensor | None,
    present: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    main: Tensor,
    residual: Tensor | None,
    indices: Tensor,
    residual_indices: Tensor | None,
    beam: int,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses centroids for every column in turn; see `vptq.ops.assign_columns`."""
    books = [main] if residual is None else [main, residual]
    stored = [indices] if residual_indices is None else [indices, residual_indices]
    check(base, coupling, present, books, stored, beam, row_weights)
    values, errors = torch.empty_like(base), torch.empty_like(base)
    if base.numel() == 0:
        return values, errors
    step = len(base) if coupling is None else 1
    weights = None if row_weights is None else cut(row_weights[None], main.shape[1])
    for start in range(0, len(base), step):
        at = slice(start, start + step)
        target = base[at] if coupling is None else base[at] + coupling[at, :start] @ errors[:start]
        vectors = cut((target - shift[at, None]) / scale[at, None], main.shape[1])
        if weights is None:
            chosen = _nearest(vectors, books, base.shape[1], beam)
        else:
            chosen = _search_weighted(vectors, weights.repeat(len(target), 1), books, beam)
        if present is not None:
            chosen = _keep_better(vectors, weights, books, [index[at] for index in stored], chosen, base.shape[1])
        for index, new in zip(stored, chosen, strict=True):
            index[at] = new.view(target.shape[0], -1)
        values[at] = join(_sum(books, chosen), base.shape[1]) * scale[at, None] + shift[at, None]
        errors[at] = values[at] - (target if present is None else present[at])
    return values, errors


def cut(columns: Tensor, vector_len: int) -> Tensor:
    """[n, rows] -> [n * vectors, vector_len]; a column's last vector is padded with zeros."""
    missing = -columns.shape[1] % vector_len
    padded = pad(columns, (0, missing)) if missing else columns
    return padded.reshape(-1, vector_len)


def join(vectors: Tensor, rows: int) -> Tensor:
    """The reverse of `cut`: padding is dropped."""
    per_column = -(-rows // vectors.shape[1])
    return vectors.reshape(-1, per_column * vectors.shape[1])[:, :rows]


def _sum(books: Sequence[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    total = books[0][chosen[0]]
    for book, index in zip(books[1:], chosen[1:], strict=True):
        total = total + book[index]
    return total


def _nearest(vectors: Tensor, books: Sequence[Tensor], rows: int, beam: int) -> list[Tensor]:
    """For each codebook an index a vector; the padding of a column's last vector has no say in its choice."""
    chosen = _search(vectors, books, beam)
    tail = rows % vectors.shape[1]
    if tail:
        per_column = -(-rows // vectors.shape[1])
        last = slice(per_column - 1, None, per_column)
        parts = _search(vectors[last, :tail].contiguous(), [book[:, :tail].contiguous() for book in books], beam)
        for index, part in zip(chosen, parts, strict=True):
            index[last] = part
    return chosen


def _search(vectors: Tensor, books: Sequence[Tensor], beam: int) -> list[Tensor]:
    search = torch.ops.vptq.nearest.default
    if len(books) == 1:
        return [search(vectors, books[0], 1)[0][:, 0]]
    main, residual = books
    if beam > 1 and len(main) * len(residual) <= PRODUCT_LIMIT:
        pair = search(vectors, (main[:, None] + residual).flatten(0, 1), 1)[0][:, 0]
        return [pair // len(residual), pair % len(residual)]
    beam = min(beam, len(main))
    step = max(1, BEAM_ELEMENTS // (beam * vectors.shape[1]))
    pairs = [_best_pairs(part, main, residual, beam) for part in vectors.split(step)]  # type: ignore[no-untyped-call]
    return [torch.cat(parts) for parts in zip(*pairs, strict=True)]


def _best_pairs(vectors: Tensor, main: Tensor, residual: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    search = torch.ops.vptq.nearest.default
    candidates = search(vectors, main, beam)[0]
    rest = vectors[:, None] - main[candidates]
    partner, distance = search(rest.flatten(0, 1), residual, 1)
    best = distance.view(candidates.shape).argmin(dim=1, keepdim=True)
    return candidates.gather(1, best)[:, 0], partner.view(candidates.shape).gather(1, best)[:, 0]


def _search_weighted(vectors: Tensor, weights: Tensor, books: Sequence[Tensor], beam: int) -> list[Tensor]:
    """The same for weighted distances; padding has weight zero, and so no say in the choice."""
    found = []
    step = max(1, BEAM_ELEMENTS // max(len(book) for book in books) // (beam if len(books) > 1 else 1))
    for x, u in zip(vectors.split(step), weights.split(step), strict=True):  # type: ignore[no-untyped-call]
        if len(books) == 1:
            found.append([_weighted_distances(x, u, books[0]).argmin(1)])
            continue
        main, residual = books
        # Sorted, not topk: equal distances by rising index, as the kernel has them.
        candidates = _weighted_distances(x, u, main).argsort(dim=1, stable=True)[:, :beam]
        rests = (x[:, None] - main[candidates]).flatten(0, 1)
        again = u.repeat_interleave(candidates.shape[1], 0)
        distances, partners = _weighted_distances(rests, again, residual).min(1)
        total = (distances + (again * rests.square()).sum(1)).view(candidates.shape)
        best = total.argmin(1, keepdim=True)
        found.append([candidates.gather(1, best)[:, 0], partners.view(candidates.shape).gather(1, best)[:, 0]])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _weighted_distances(vectors: Tensor, weights: Tensor, book: Tensor) -> Tensor:
    """sum over elements of weights (vectors - book)^2, less what is the same for all of the book, [n, K]."""
    return torch.addmm(weights @ book.square().T, weights * vectors, book.T, alpha=-2)


def _keep_better(
    vectors: Tensor,
    weights: Tensor | None,
    books: Sequence[Tensor],
    stored: Sequence[Tensor],
    chosen: Sequence[Tensor],
    rows: int,
) -> list[Tensor]:
    """A vector whose present centroids are at least as near as those found keeps them: a beam can find worse ones."""
    now = [index.flatten() for index in stored]

    def distance(pair: Sequence[Tensor]) -> Tensor:
        squares = cut(join(vectors - _sum(books, pair), rows), vectors.shape[1]).square()
        if weights is not None:
            squares = (squares.view(-1, *weights.shape) * weights).flatten(0, 1)
        return squares.sum(1)

    worse = distance(chosen) >= distance(now)
    return [torch.where(worse, old, new) for old, new in zip(now, chosen, strict=True)]


def check(
    base: Tensor,
    coupling: Tensor | None,
    present: Tensor | None,
    books: Sequence[Tensor],
    stored: Sequence[Tensor],
    beam: int,
    row_weights: Tensor | None,
) -> None:
    """Raises ConfigError where shapes, dtypes or `beam` do not fit."""
    columns, rows = base.shape
    if row_weights is not None and tuple(row_weights.shape) != (rows,):
        raise ConfigError(f"row_weights is {tuple(row_weights.shape)}; {rows} rows need ({rows},)")
    if coupling is not None and tuple(coupling.shape) != (columns, columns):
        raise ConfigError(f"coupling is {tuple(coupling.shape)}; {columns} columns need ({columns}, {columns})")
    if present is not None and present.shape != base.shape:
        raise ConfigError(f"present is {tuple(present.shape)}; it must have the shape of base, {tuple(base.shape)}")
    if len(books) != len(stored):
        raise ConfigError("residual and residual_indices come together or not at all")
    expected = (columns, -(-rows // books[0].shape[1]))
    for index in stored:
        if index.dtype != torch.int64 or tuple(index.shape) != expected:
            raise ConfigError(f"indices are {index.dtype} {tuple(index.shape)}; they must be torch.int64 {expected}")
    if beam < 1:
        raise ConfigError(f"beam is {beam}; it must be at least 1")


LIBRARY.impl("assign_columns", assign_columns, "CompositeExplicitAutograd")
