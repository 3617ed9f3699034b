"""What the Triton kernels share: from packed indices to the weights of a tile.

A tile is [ROWS, COLUMNS, VP]: some vector rows, some columns, and the elements of one vector. VP is the vector length
rounded up to a power of two, and the codebooks here are padded to it, so that one index costs one aligned load of a
whole vector (16 bytes at v = 6 and 8) and never one per weight. Columns are counted in quantized order: first the
outliers, then the groups.

Everything is computed in float32. A value that the format rounds goes through `narrow`, so that the weight which
`dequantize` writes and the tensor cores multiply is the reference's, bit for bit.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
WORD_BITS = tl.constexpr(32)
OUTLIER_COLUMNS = tl.constexpr(16)
"""Outlier columns a step: the fewest that a matrix multiplication takes, so that all splits get some."""


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 rounded to what `dtype` holds, ties to even, and still float32."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the lower half off where a GPU rounds.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        result = tl.where(value == value, bits.to(tl.uint32).to(tl.float32, bitcast=True), value)
    else:
        result = value.to(dtype).to(tl.float32)
    return result


@triton.jit
def as_operand(value, dtype: tl.constexpr):
    """A matrix multiplication's operand; the interpreter cannot multiply bfloat16, float32 holds the same numbers."""
    return value.to(tl.float32) if INTERPRETED else value.to(dtype)


@triton.jit
def unsigned(stored):
    """The value of an index: int16 carries a uint16 bit pattern, wider integers the value."""
    return stored.to(tl.int32) & 0xFFFF if stored.dtype == tl.int16 else stored.to(tl.int32)


@triton.jit
def original_columns(perm, position, inside, in_features):
    """Where the columns at `position` stand in the input; what is no permutation reads nothing outside."""
    if perm is None:
        result = position
    else:
        stored = unsigned(tl.load(perm + position, mask=inside, other=0))
        result = tl.minimum(tl.maximum(stored, 0), in_features - 1)
    return result


@triton.jit
def look_up(codebook, entry, inside, VP: tl.constexpr):
    """float32 [ROWS, COLUMNS, VP]: the vectors of `entry` [ROWS, COLUMNS]; zero where `inside` [COLUMNS] is false."""
    place = entry[:, :, None] * VP + tl.arange(0, VP)[None, None, :]
    return tl.load(codebook + place, mask=inside[None, :, None], other=0.0).to(tl.float32)


@triton.jit
def main_values(
    codebook,
    indices,
    residual_codebook,
    residual_indices,
    row,
    column,
    inside,
    num_rows,
    line_length,
    group_size,
    entries,
    residual_entries,
    ROUND: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    VP: tl.constexpr,
):
    """float32 [ROWS, COLUMNS, VP]: the sums of both stages at vector rows `row`, columns `column` after the outliers.

    `ROUND` rounds the sums to the layer's dtype. `BITS` of 0 stands for unpacked 16-bit indices. A column outside gives
    zeros; a row outside gives the last row.
    """
    TOTAL: tl.constexpr = BITS + RESIDUAL_BITS
    row = tl.minimum(row, num_rows - 1)
    if GROUPS > 1:
        group = column // group_size
        within = column - group * group_size
        line = (group[None, :] * num_rows + row[:, None]).to(tl.int64) * line_length
    else:
        group = column * 0
        within = column
        line = row[:, None].to(tl.int64) * line_length
    if BITS > 0:
        # A value lies in one 32-bit word, or straddles two. Neighbouring lanes read the same or the next word.
        bit = within * TOTAL
        shift = (bit % WORD_BITS).to(tl.uint32)[None, :]
        word = indices + line + (bit // WORD_BITS)[None, :]
        value = tl.load(word, mask=inside[None, :], other=0).to(tl.uint32, bitcast=True) >> shift
        if WORD_BITS % TOTAL != 0:
            straddles = inside & (bit % WORD_BITS + TOTAL > WORD_BITS)
            above = tl.load(word + 1, mask=straddles[None, :], other=0).to(tl.uint32, bitcast=True)
            value |= (above << 1) << (31 - shift)  # two steps: a shift by 32 is undefined
        main = (value & ((1 << BITS) - 1)).to(tl.int32)
    else:
        main = unsigned(tl.load(indices + line + within[None, :], mask=inside[None, :], other=0))
        main = tl.minimum(main, entries - 1)
    result = look_up(codebook, main + (group * entries)[None, :], inside, VP)
    if residual_codebook is not None:
        if BITS > 0:
            second = ((value >> BITS) & ((1 << RESIDUAL_BITS) - 1)).to(tl.int32)
        else:
            second = unsigned(tl.load(residual_indices + line + within[None, :], mask=inside[None, :], other=0))
            second = tl.minimum(second, residual_entries - 1)
        result += look_up(residual_codebook, second + (group * residual_entries)[None, :], inside, VP)
        if ROUND:
            result = narrow(result, codebook.dtype.element_ty)
    return result


@triton.jit
def outlier_values(
    codebook,
    indices,
    row,
    column,
    inside,
    out_features,
    outlier_size,
    entries,
    V: tl.constexpr,
    VP: tl.constexpr,
    VO: tl.constexpr,
):
    """float32 [ROWS, COLUMNS, VP]: weights of outlier columns, in the main tile's rows.

    Their vectors have a length of their own and begin at other rows, so each weight is found by itself; they are few.
    """
    output = tl.minimum(row[:, None, None] * V + tl.arange(0, VP)[None, None, :], out_features - 1)
    mask = inside[None, :, None]
    stored = tl.load(indices + (output // VO) * outlier_size + column[None, :, None], mask=mask, other=0)
    entry = tl.minimum(unsigned(stored), entries - 1)
    return tl.load(codebook + entry * VO + output % VO, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalized(weight, scale, shift, original, inside, dtype: tl.constexpr):
    """Weights times the scale plus the bias of their input columns, each step rounded to `dtype`."""
    if scale is not None:
        factor = tl.load(scale + original, mask=inside, other=0.0).to(tl.float32)
        weight = narrow(weight * factor[None, :, None], dtype)
    if shift is not None:
        offset = tl.load(shift + original, mask=inside, other=0.0).to(tl.float32)
        weight = narrow(weight + offset[None, :, None], dtype)
    return weight


@triton.jit
def turned(weight):
    """[ROWS, COLUMNS, VP] as the matrix [COLUMNS, ROWS * VP] to multiply by; vectors stay whole on their way."""
    return tl.reshape(tl.permute(weight, (1, 0, 2)), (weight.shape[1], weight.shape[0] * weight.shape[2]))
