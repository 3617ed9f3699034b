"""`vptq::nearest` and `vptq::assign_columns` on GPUs: what the dispatcher calls, and how it launches `triton_nearest`.

Nothing here reads a result, so the host never waits for the GPU. A column of the second-order pass is three launches:
a product with the errors of the columns before it, `rank`, and `settle_columns`. A column alone has too few vectors to
fill a GPU with blocks of them, so several programs share the centroids of a block.

Two codebooks of few pairs are searched as one codebook of all sums, as the C++ kernel does; otherwise every one of
`beam` main centroids is tried with its best residual centroid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vptq.ops import columns, devices, search, triton_paths
from vptq.ops import triton_nearest as kernels

TILE = 64
"""Centroids that are scored together, and looked at again together."""
RANK_ROWS, SETTLE_ROWS = 64, 8
"""Vectors of a program. Not measured on a GPU."""
PROGRAMS = 2
"""Programs of `rank` to aim for on a multiprocessor, by sharing the centroids among them."""
SPLIT_TILES = 4
"""Tiles that a program scores at least for each that it remembers: `settle` looks at what all of them remember."""
MAX_BEAM = 64
PAIR_LIMIT = 65536
"""Up to so many pairs of main and residual centroids, their sums are searched as one codebook."""
SCRATCH_BYTES = 1 << 28
"""What `rank` may leave for `settle` to read; vectors that would need more go one part after the other."""


@dataclass(frozen=True)
class Book:
    """A codebook the way the kernels read it.

    Attributes:
        entries: float32 [K, v].
        table: float32 [kinds, VP, tiles * TILE], the entries less `center`, turned; zeros where there are none. The
            second kind, where there is one, has the coordinates alone that a vector cut short has.
        half_norms: float32 [kinds, tiles * TILE]; infinite where there is no entry, or none that is a number.
        center: float32 [VP].
    """

    entries: Tensor
    table: Tensor
    half_norms: Tensor
    center: Tensor

    @classmethod
    def of(cls, entries: Tensor, tail: int = 0) -> Book:
        """Of entries [K, v], for vectors of which some have but their first `tail` coordinates (0: none are cut)."""
        entries = entries.contiguous()
        count, length = entries.shape
        center = _middle(entries)
        moved = entries - center
        kinds = [moved] if not tail else [moved, moved * (torch.arange(length, device=moved.device) < tail)]
        padding = (0, max(16, 1 << (length - 1).bit_length()) - length, 0, -count % TILE)
        tables, norms = [], []
        for kind in kinds:
            norm = kind.square().sum(1) / 2
            usable = norm < torch.inf
            table = kind.where(usable[:, None], 0.0)
            tables.append(torch.nn.functional.pad(table, padding).t())
            norms.append(torch.nn.functional.pad(norm.where(usable, torch.inf), padding[2:], value=torch.inf))
        return cls(
            entries,
            torch.stack(tables).contiguous(),
            torch.stack(norms),
            torch.nn.functional.pad(center, padding[:2]),
        )

    @property
    def tiles(self) -> int:
        """How many tiles its entries fill."""
        return self.half_norms.shape[1] // TILE


def _middle(entries: Tensor) -> Tensor:
    """[v], the middle of the entries, to a power of two near their spread: what is exact stays exact.

    Scores around it keep the digits that data far from the origin would lose.
    """
    known = entries.isfinite()
    low = entries.where(known, torch.inf).amin(0)
    spread = entries.where(known, -torch.inf).amax(0) - low
    step = torch.ldexp(torch.ones_like(spread), torch.frexp(spread).exponent - 1)
    middle = ((low + spread / 2) / step).round() * step
    return middle.where(middle.isfinite(), 0.0)


@dataclass(frozen=True)
class _Cut:
    """Columns of x [columns, rows] cut into vectors, by kernel parameter: whole ones first, then those cut short."""

    columns: int
    rows: int
    length: int

    @property
    def cut_from(self) -> int:
        """Number of the first vector that is cut short."""
        whole = self.columns * (self.rows // self.length)
        return -(-whole // RANK_ROWS) * RANK_ROWS

    def blocks(self, size: int) -> int:
        """How many blocks of so many vectors hold all; `size` divides RANK_ROWS."""
        cut = self.rows % self.length
        numbers = self.cut_from + self.columns if cut else self.columns * (self.rows // self.length)
        return -(-numbers // size)

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.columns, self.rows, self.cut_from


def nearest(vectors: Tensor, codebook: Tensor, beam: int = 1) -> tuple[Tensor, Tensor]:
    """The `beam` nearest centroids of every vector; see `vptq.ops.nearest`."""
    search.check(vectors, codebook, beam)
    count, length = vectors.shape
    if count == 0 or _refuses(vectors.device, length, beam):
        return search.nearest(vectors, codebook, beam)
    vectors, book = vectors.contiguous(), Book.of(codebook)
    indices = vectors.new_empty((count, beam), dtype=torch.int64)
    distances = vectors.new_empty((count, beam))
    with devices.current(vectors.device):
        for part in _parts(count, 1, book, beam):
            cut = _Cut(1, (part.stop - part.start) * length, length)
            ranked = _rank(vectors[part], None, None, None, cut, book, beam)
            kernels.settle_nearest[(cut.blocks(SETTLE_ROWS),)](
                vectors[part], book.entries, *ranked, indices[part], distances[part], *cut.arguments,
                len(codebook), book.tiles, ranked[0].shape[1], beam, **_shape(book, beam), num_warps=1,
            )  # fmt: skip
    return indices, distances


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
    columns.check(base, coupling, present, books, stored, beam, row_weights)
    pairs = len(main) * len(residual) if residual is not None else 0
    summed = residual is not None and beam > 1 and pairs <= PAIR_LIMIT
    tried = 1 if residual is None or summed else min(beam, len(main))
    if _refuses(base.device, main.shape[1], tried):
        return columns.assign_columns(
            base, coupling, present, scale, shift, main, residual, indices, residual_indices, beam, row_weights
        )
    base, scale, shift = base.contiguous(), scale.contiguous(), shift.contiguous()
    present = None if present is None else present.contiguous()
    row_weights = None if row_weights is None else row_weights.contiguous()
    values, errors = torch.empty_like(base), torch.empty_like(base)
    if base.numel() == 0:
        return values, errors
    written = [index.contiguous() for index in stored]
    count, rows = base.shape
    entries = main if residual is None or not summed else (main[:, None] + residual).flatten(0, 1)
    book = Book.of(entries, rows % main.shape[1])
    partners = None if residual is None or summed else residual.contiguous()
    per_column = -(-rows // main.shape[1])
    steps = _parts(count, per_column, book, tried) if coupling is None else (slice(p, p + 1) for p in range(count))
    with devices.current(base.device):
        for at in steps:
            target = base[at] if coupling is None else _target(base, coupling, errors, at.start)
            cut = _Cut(len(target), rows, main.shape[1])
            ranked = _rank(target, scale[at], shift[at], row_weights, cut, book, tried)
            kernels.settle_columns[(cut.blocks(SETTLE_ROWS),)](
                target, scale[at], shift[at], row_weights, None if present is None else present[at], book.entries,
                partners, *ranked, written[0][at], written[1][at] if residual is not None else None, values[at],
                errors[at], *cut.arguments, len(entries), book.tiles, ranked[0].shape[1],
                1 if residual is None else len(residual), **_shape(book, tried), num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    for index, new in zip(stored, written, strict=True):
        if new is not index:
            index.copy_(new)
    return values, errors


def _target(base: Tensor, coupling: Tensor, errors: Tensor, column: int) -> Tensor:
    """[1, rows]: the base of a column and what the errors of those before it ask for."""
    return torch.addmv(base[column], errors[:column].t(), coupling[column, :column])[None]


def _rank(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weights: Tensor | None, cut: _Cut, book: Book, beam: int
) -> tuple[Tensor, Tensor]:
    """For each vector and split the best tiles: lowest scores and numbers [vectors, splits, slots]."""
    slots, blocks = _slots(book, beam), cut.blocks(RANK_ROWS)
    least = 1 if slots == 1 else SPLIT_TILES * slots
    wanted = max(1, PROGRAMS * devices.multiprocessors(x.device) // blocks)
    tiles_a_split = max(-(-book.tiles // wanted), min(least, book.tiles))
    splits = -(-book.tiles // tiles_a_split)
    minima = x.new_empty((blocks * RANK_ROWS, splits, slots))
    tiles = torch.empty_like(minima, dtype=torch.int32)
    shape = {name: size for name, size in _shape(book, beam).items() if name != "KEPT"}
    kernels.rank[(blocks, splits)](
        x, scale, shift, weights, book.table, book.half_norms, book.center, minima, tiles, *cut.arguments, book.tiles,
        tiles_a_split, **shape | {"ROWS": RANK_ROWS, "VP": len(book.center), "PRECISION": _precision(x.device)},
        num_warps=4,
    )  # fmt: skip
    return minima, tiles


def _slots(book: Book, beam: int) -> int:
    return _power_of_two(min(beam, book.tiles))


def _shape(book: Book, beam: int) -> dict[str, int]:
    """The compile-time sizes of `settle`."""
    sizes = {"V": book.entries.shape[1], "TILE": TILE, "ROWS": SETTLE_ROWS}
    return sizes | {"SLOTS": _slots(book, beam), "KEPT": _power_of_two(beam)}


def _parts(count: int, vectors: int, book: Book, beam: int) -> Iterator[slice]:
    """`count` runs of so many vectors in as few parts as the scratch allows."""
    step = max(1, SCRATCH_BYTES // (8 * _slots(book, beam) * vectors))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _refuses(device: torch.device, length: int, beam: int) -> bool:
    why = triton_paths.obstacle(length, torch.float32, devices.capability(device))
    if not why and beam > MAX_BEAM:
        why = f"a beam of {beam} (at most {MAX_BEAM})"
    if why:
        _tell(why)
    return bool(why)


@lru_cache
def _tell(why: str) -> None:
    logging.getLogger("vptq").warning("vptq searches nearest centroids in PyTorch, not by its Triton kernels: %s", why)


@lru_cache
def _precision(device: torch.device) -> str:
    """How a product of float32 numbers is made: on tensor cores from three bfloat16 parts each, which keep all 24 bits
    (six products), where there are such; otherwise by float32 arithmetic. TF32 would lose 13 bits."""
    capability = devices.capability(device)
    if capability is None or capability < (8, 0):
        return "ieee"
    from triton.backends.nvidia.compiler import CUDAOptions

    return "bf16x6" if "bf16x6" in CUDAOptions.allowed_dot_input_precisions else "ieee"
