"""The Triton kernels behind `vptq::nearest` and `vptq::assign_columns`: nearest centroids without the distance matrix.

|x - c|^2 is smallest where the score |c|^2/2 - x.c is, a matrix product and an addition. As in C++, the kernel that
does nearly all of the arithmetic remembers little, and another finds out afterwards who it was:

    rank      all scores of a block of vectors, tile by tile of centroids -> the tiles with the lowest scores
    settle    those tiles' centroids again, by their distances -> the nearest ones

Rows may count differently: with weights u a row the score is u.c^2/2 - (u x).c, two products.

The `beam` nearest centroids lie in the `beam` best tiles, since every better tile holds a nearer one. A score is the
same bits in whichever block, split or tile it is computed, and everything is chosen by (value, number): of equals the
lower index wins, and the same input gives the same bytes. No atomics, and no program waits for another.

A vector is `V` rows of a column of x [columns, rows] that lie side by side; the last one of a column may be cut short
by the end of the rows, and then only what is there counts. Vectors are numbered whole ones first, the cut ones of all
columns from `cut_from` on, a multiple of every block: each block has one kind and needs one table of scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vptq.ops.triton_best import LAST, is_better, lowest, replace_worst


@triton.jit
def vectors_of_block(columns, rows, cut_from, V: tl.constexpr, ROWS: tl.constexpr):
    """For each vector of this program [ROWS]: its number, column, first row, place among the column's; if it exists."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    whole = rows // V
    is_cut = number >= cut_from
    column = tl.where(is_cut, number - cut_from, number // tl.maximum(whole, 1))
    place = tl.where(is_cut, whole, number % tl.maximum(whole, 1))
    present = (column < columns) & (place * V < rows)
    return number, tl.where(present, column, 0), place * V, place, present


@triton.jit
def coordinate(x, scale, shift, column, row, rows, element, present):
    """Coordinates of vectors in the units of the codebook; zero where there is no such row."""
    inside = present & (row + element < rows)
    value = tl.load(x + column.to(tl.int64) * rows + row + element, mask=inside, other=0.0)
    if scale is not None:
        value = (value - tl.load(shift + column)) / tl.load(scale + column)
    return tl.where(inside, value, 0.0)


@triton.jit
def weighted(square, weights, row, rows, element, present):
    """Squares of coordinates times what their rows count."""
    if weights is not None:
        square *= tl.load(weights + row + element, mask=present & (row + element < rows), other=0.0)
    return square


@triton.jit
def rank(
    x, scale, shift, weights, table, half_norms, center, minima, tiles,
    columns, rows, cut_from, all_tiles, tiles_a_split,
    V: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The `SLOTS` best of one split's tiles, with the lowest score in each, for a block of vectors.

    The grid is (blocks of vectors, splits). `table` [kinds, VP, all_tiles * TILE] holds the centroids less `center`,
    turned, and `half_norms` half their squares: infinite for those that are no numbers or no centroids. Vectors that
    are no numbers, or too large to square, find every tile infinitely bad and get the first ones.
    """
    number, column, row, _, present = vectors_of_block(columns, rows, cut_from, V, ROWS)
    element = tl.arange(0, VP)
    value = coordinate(x, scale, shift, column[:, None], row[:, None], rows, element[None, :], present[:, None])
    inside = (element < V)[None, :] & (row[:, None] + element[None, :] < rows)
    value = tl.where(inside, value - tl.load(center + element)[None, :], 0.0)
    if weights is not None:
        counts = tl.load(weights + row[:, None] + element[None, :], mask=inside & present[:, None], other=0.0)
        halves = counts / 2
        usable = tl.sum(counts * value * value, 1) < float("inf")
        value *= counts
    else:
        usable = tl.sum(value * value, 1) < float("inf")
    value = tl.where(usable[:, None], value, 0.0)
    width = all_tiles * TILE
    kind = (tl.program_id(0) * ROWS >= cut_from).to(tl.int32)
    table += kind * VP * width
    half_norms += kind * width
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full([ROWS, SLOTS], float("inf"), tl.float32)
    names = tl.zeros([ROWS, SLOTS], tl.int32) + all_tiles + slot
    first = tl.program_id(1) * tiles_a_split
    for tile in range(first, tl.minimum(first + tiles_a_split, all_tiles)):
        entry = tile * TILE + tl.arange(0, TILE)
        centroids = tl.load(table + element[:, None] * width + entry[None, :])
        norms = tl.load(half_norms + entry)[None, :]
        if weights is not None:
            norms = tl.where(
                norms < float("inf"), tl.dot(halves, centroids * centroids, input_precision=PRECISION), norms
            )
        scores = norms - tl.dot(value, centroids, input_precision=PRECISION)
        score = tl.where(usable, tl.min(scores, 1), float("inf"))
        best, names = replace_worst(best, names, score, tl.zeros([ROWS], tl.int32) + tile)
    place = (number.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))[:, None] * SLOTS + slot
    tl.store(minima + place, best)
    tl.store(tiles + place, names)


@triton.jit
def squared_distances(
    x, scale, shift, weights, codebook, entry, column, row, rows, present, entries, V: tl.constexpr
):  # fmt: skip
    """|x - c|^2 [ROWS, n], weighted, of each vector to its own centroids `entry`, in the order of the elements."""
    total = tl.zeros(entry.shape, tl.float32)
    for element in tl.static_range(V):
        value = coordinate(x, scale, shift, column, row, rows, element, present)
        known = (entry < entries) & (present & (row + element < rows))[:, None]
        difference = value[:, None] - tl.load(codebook + entry * V + element, mask=known, other=0.0)
        total += weighted(difference * difference, weights, row[:, None], rows, element, present[:, None])
    return total


@triton.jit
def nearest_of_tiles(
    x, scale, shift, weights, codebook, minima, tiles, number, column, row, rows, present, entries, all_tiles, splits,
    V: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The `KEPT` nearest centroids [ROWS, KEPT] of each vector, in no order: distance (NaN: infinite) and number.

    There may be fewer than that: what is missing has numbers from `entries` on.
    """
    slot = tl.arange(0, SLOTS)[None, :]
    place = number.to(tl.int64)[:, None] * splits * SLOTS
    best, names = tl.load(minima + place + slot), tl.load(tiles + place + slot)
    for other in range(SLOTS, splits * SLOTS):
        one = number.to(tl.int64) * splits * SLOTS + other
        name = tl.load(tiles + one)
        best, names = replace_worst(best, names, tl.load(minima + one), tl.where(name < all_tiles, name, LAST))
    found = tl.full([ROWS, KEPT], float("inf"), tl.float32)
    who = tl.zeros([ROWS, KEPT], tl.int32) + entries + tl.arange(0, KEPT)[None, :]
    for chosen in range(SLOTS):
        tile = tl.sum(tl.where(slot == chosen, names, 0), 1)
        entry = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        key = squared_distances(x, scale, shift, weights, codebook, entry, column, row, rows, present, entries, V)
        key = tl.where((entry < entries) & (key == key), key, float("inf"))
        entry = tl.where(entry < entries, entry, LAST)
        value, index = lowest(key, entry)
        while tl.max(is_better(value, index, found, who).to(tl.int32), 0) > 0:
            found, who = replace_worst(found, who, value, index)
            key = tl.where(entry == index[:, None], float("inf"), key)
            entry = tl.where(entry == index[:, None], LAST, entry)
            value, index = lowest(key, entry)
    return found, who


@triton.jit
def settle_nearest(
    x, codebook, minima, tiles, indices, distances, columns, rows, cut_from, entries, all_tiles, splits, beam,
    V: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The `beam` nearest centroids of a block of vectors in order: numbers and distances [vectors, beam]."""
    number, column, row, _, present = vectors_of_block(columns, rows, cut_from, V, ROWS)
    found, who = nearest_of_tiles(
        x, None, None, None, codebook, minima, tiles, number, column, row, rows, present, entries, all_tiles, splits,
        V, TILE, SLOTS, KEPT, ROWS,
    )  # fmt: skip
    order = tl.zeros([ROWS, KEPT], tl.int32)
    slot = tl.arange(0, KEPT)[None, :]
    for other in range(KEPT):
        value = tl.min(tl.where(slot == other, found, float("inf")), 1)[:, None]
        name = tl.sum(tl.where(slot == other, who, 0), 1)[:, None]
        order += ((value < found) | ((value == found) & (name < who))).to(tl.int32)
    mask = present[:, None] & (order < beam)
    place = number.to(tl.int64)[:, None] * beam + order
    exact = squared_distances(x, None, None, None, codebook, who, column, row, rows, present, entries, V)
    tl.store(indices + place, who.to(tl.int64), mask=mask)
    tl.store(distances + place, exact, mask=mask)


@triton.jit
def best_pair(
    x, scale, shift, weights, codebook, residual, who, column, row, rows, present, entries, partners,
    V: tl.constexpr, TILE: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The main centroid among `who` [ROWS, KEPT] and the residual one whose sum is nearest; of equals the first."""
    best = tl.full([ROWS], float("inf"), tl.float32)
    main, partner = tl.zeros([ROWS], tl.int32) + LAST, tl.zeros([ROWS], tl.int32)
    slot = tl.arange(0, KEPT)[None, :]
    for chosen in range(KEPT):
        candidate = tl.sum(tl.where(slot == chosen, who, 0), 1)
        exists = candidate < entries
        candidate = tl.where(exists, candidate, LAST)
        for first in range(0, partners, TILE):
            entry = first + tl.arange(0, TILE)
            key = tl.zeros([ROWS, TILE], tl.float32)
            for element in tl.static_range(V):
                inside = exists & present & (row + element < rows)
                left = coordinate(x, scale, shift, column, row, rows, element, present)
                left -= tl.load(codebook + candidate * V + element, mask=inside, other=0.0)
                right = tl.load(residual + entry * V + element, mask=entry < partners, other=0.0)
                difference = tl.where(inside[:, None], left[:, None] - right[None, :], 0.0)
                key += weighted(difference * difference, weights, row[:, None], rows, element, present[:, None])
            key = tl.where((entry < partners)[None, :] & (key == key), key, float("inf"))
            value, index = lowest(key, tl.zeros([ROWS, TILE], tl.int32) + entry[None, :])
            better = exists & ((value < best) | ((value == best) & (candidate < main)))
            best = tl.where(better, value, best)
            main, partner = tl.where(better, candidate, main), tl.where(better, index, partner)
    return main, partner


@triton.jit
def entry_of(codebook, residual, main, partner, element, inside, V: tl.constexpr):
    """One coordinate of each vector's chosen entry [ROWS], the sum of both stages."""
    value = tl.load(codebook + main * V + element, mask=inside, other=0.0)
    if residual is not None:
        value += tl.load(residual + partner * V + element, mask=inside, other=0.0)
    return value


@triton.jit
def settle_columns(
    x, scale, shift, weights, held, codebook, residual, minima, tiles, indices, residual_indices, values, errors,
    columns, rows, cut_from, entries, all_tiles, splits, partners,
    V: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """New centroids for a block of vectors: their indices, what they stand for, and the errors that leaves.

    `held` [columns, rows] is what the indices stand for now, or None; those that are as near as the new ones stay.
    With `residual_indices` but no `residual` the codebook holds all sums, those of a main centroid side by side.
    """
    number, column, row, place, present = vectors_of_block(columns, rows, cut_from, V, ROWS)
    _, who = nearest_of_tiles(
        x, scale, shift, weights, codebook, minima, tiles, number, column, row, rows, present, entries, all_tiles,
        splits, V, TILE, SLOTS, KEPT, ROWS,
    )  # fmt: skip
    if residual is not None:
        main, partner = best_pair(
            x, scale, shift, weights, codebook, residual, who, column, row, rows, present, entries, partners,
            V, TILE, KEPT, ROWS,
        )  # fmt: skip
    else:
        main, partner = tl.min(who, 1), tl.zeros([ROWS], tl.int32)
    stored = column.to(tl.int64) * ((rows + V - 1) // V) + place
    if held is not None:
        old, old_partner = tl.load(indices + stored, mask=present, other=0).to(tl.int32), partner
        if residual_indices is not None:
            second = tl.load(residual_indices + stored, mask=present, other=0).to(tl.int32)
            if residual is not None:
                old_partner = second
            else:
                old = old * partners + second
        now, then = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        for element in tl.static_range(V):
            inside = present & (row + element < rows)
            value = coordinate(x, scale, shift, column, row, rows, element, present)
            new_difference = value - entry_of(codebook, residual, main, partner, element, inside, V)
            old_difference = value - entry_of(codebook, residual, old, old_partner, element, inside, V)
            now += weighted(new_difference * new_difference, weights, row, rows, element, present)
            then += weighted(old_difference * old_difference, weights, row, rows, element, present)
        stays = now >= then
        main, partner = tl.where(stays, old, main), tl.where(stays, old_partner, partner)
    for element in tl.static_range(V):
        inside = present & (row + element < rows)
        at = column.to(tl.int64) * rows + row + element
        value = entry_of(codebook, residual, main, partner, element, inside, V)
        value = value * tl.load(scale + column) + tl.load(shift + column)
        before = tl.load(x + at if held is None else held + at, mask=inside, other=0.0)
        tl.store(values + at, value, mask=inside)
        tl.store(errors + at, value - before, mask=inside)
    if residual_indices is not None:
        if residual is None:
            partner = main % partners
            main = main // partners
        tl.store(residual_indices + stored, partner.to(tl.int64), mask=present)
    tl.store(indices + stored, main.to(tl.int64), mask=present)
