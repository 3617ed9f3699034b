"""The Triton kernels: a vector times a layer, a few vectors on tensor cores, and the dense weight.

Sums run over columns, which several programs share where a layer has too few rows to fill a GPU; each writes its part
and `add_parts` adds them in one order, so that the same input gives the same bytes. No atomics, no scratch to clear.
Names in capitals are compile-time constants: what is fixed for a layer (vector length, index bits), and the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vptq.ops.triton_lookup import (
    OUTLIER_COLUMNS,
    as_operand,
    main_values,
    narrow,
    normalized,
    original_columns,
    outlier_values,
    turned,
)


@triton.jit
def multiply_vector(
    x, out, bias, codebook, indices, residual_codebook, residual_indices, outlier_codebook, outlier_indices,
    perm, scale, shift,
    in_features, out_features, outlier_size, group_size, num_rows, line_length,
    entries, residual_entries, outlier_entries, columns_a_split,
    GROUPS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, VO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One token's outputs of `ROWS` vector rows over one split's columns, in float32 throughout.

    The grid is (row blocks, splits, tokens). Permutation, scale and bias of the columns go into the input, as many
    times as there are row blocks, and the weights stay bare: w x = q (s x) + b x.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split, token = tl.program_id(1), tl.program_id(2)
    x += token.to(tl.int64) * in_features
    sums = tl.zeros([ROWS, COLUMNS, VP], tl.float32)
    shifted = tl.zeros([COLUMNS], tl.float32)
    last = tl.minimum((split + 1) * columns_a_split, in_features - outlier_size)
    for first in range(split * columns_a_split, last, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < last
        original = original_columns(perm, column + outlier_size, inside, in_features)
        value = tl.load(x + original, mask=inside, other=0.0).to(tl.float32)
        if shift is not None:
            shifted += value * tl.load(shift + original, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            value *= tl.load(scale + original, mask=inside, other=0.0).to(tl.float32)
        sums += value[None, :, None] * main_values(
            codebook, indices, residual_codebook, residual_indices, row, column, inside, num_rows, line_length,
            group_size, entries, residual_entries, False, GROUPS, BITS, RESIDUAL_BITS, VP,
        )  # fmt: skip
    total = tl.sum(sums, 1) + tl.sum(shifted, 0)
    if outlier_codebook is not None:
        for first in range(split * OUTLIER_COLUMNS, outlier_size, tl.num_programs(1) * OUTLIER_COLUMNS):
            column = first + tl.arange(0, OUTLIER_COLUMNS)
            inside = column < outlier_size
            original = original_columns(perm, column, inside, in_features)
            value = tl.load(x + original, mask=inside, other=0.0).to(tl.float32)
            if shift is not None:
                total += tl.sum(value * tl.load(shift + original, mask=inside, other=0.0).to(tl.float32), 0)
            if scale is not None:
                value *= tl.load(scale + original, mask=inside, other=0.0).to(tl.float32)
            weight = outlier_values(
                outlier_codebook, outlier_indices, row, column, inside, out_features, outlier_size, outlier_entries,
                V, VP, VO,
            )  # fmt: skip
            total += tl.sum(value[None, :, None] * weight, 1)
    element = tl.arange(0, VP)[None, :]
    output = row[:, None] * V + element
    mask = (element < V) & (output < out_features)
    if WHOLE:
        out += token.to(tl.int64) * out_features
        if bias is not None:
            total += tl.load(bias + output, mask=mask, other=0.0).to(tl.float32)
        total = narrow(total, out.dtype.element_ty)
    else:
        out += (split.to(tl.int64) * tl.num_programs(2) + token) * out_features
    tl.store(out + output, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def multiply_tiles(
    x, out, bias, codebook, indices, residual_codebook, residual_indices, outlier_codebook, outlier_indices,
    perm, scale, shift,
    tokens, in_features, out_features, outlier_size, group_size, num_rows, line_length,
    entries, residual_entries, outlier_entries, columns_a_split,
    GROUPS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, VO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Outputs of `TOKENS` tokens and `ROWS` vector rows over one split's columns, on tensor cores.

    The grid is (row blocks, splits, token blocks). x has its columns in quantized order. A tile of the weight is made
    as `dequantize` makes it, and multiplied while it is at hand.
    """
    dtype: tl.constexpr = codebook.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS))[:, None]
    present = token < tokens
    x += token.to(tl.int64) * in_features
    sums = tl.zeros([TOKENS, ROWS * VP], tl.float32)
    last = tl.minimum((split + 1) * columns_a_split, in_features - outlier_size)
    for first in range(split * columns_a_split, last, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < last
        position = column + outlier_size
        weight = main_values(
            codebook, indices, residual_codebook, residual_indices, row, column, inside, num_rows, line_length,
            group_size, entries, residual_entries, True, GROUPS, BITS, RESIDUAL_BITS, VP,
        )  # fmt: skip
        original = original_columns(perm, position, inside, in_features)
        weight = as_operand(normalized(weight, scale, shift, original, inside, dtype), dtype)
        value = tl.load(x + position[None, :], mask=inside[None, :] & present, other=0.0)
        sums = tl.dot(as_operand(value, dtype), turned(weight), sums, input_precision="ieee")
    if outlier_codebook is not None:
        for first in range(split * OUTLIER_COLUMNS, outlier_size, tl.num_programs(1) * OUTLIER_COLUMNS):
            column = first + tl.arange(0, OUTLIER_COLUMNS)
            inside = column < outlier_size
            weight = outlier_values(
                outlier_codebook, outlier_indices, row, column, inside, out_features, outlier_size, outlier_entries,
                V, VP, VO,
            )  # fmt: skip
            original = original_columns(perm, column, inside, in_features)
            weight = as_operand(normalized(weight, scale, shift, original, inside, dtype), dtype)
            value = tl.load(x + column[None, :], mask=inside[None, :] & present, other=0.0)
            sums = tl.dot(as_operand(value, dtype), turned(weight), sums, input_precision="ieee")
    flat = tl.arange(0, ROWS * VP)[None, :]
    output = (tl.program_id(0) * ROWS + flat // VP) * V + flat % VP
    mask = (flat % VP < V) & (output < out_features)
    if WHOLE:
        if bias is not None:
            sums += tl.load(bias + output, mask=mask, other=0.0).to(tl.float32)
        sums = narrow(sums, out.dtype.element_ty)
    else:
        out += split.to(tl.int64) * tokens * out_features
    place = token.to(tl.int64) * out_features + output
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=mask & present)


@triton.jit
def add_parts(parts, out, bias, splits, count, out_features, BLOCK: tl.constexpr):
    """out [count] = the sum of parts [splits, count] in their order, plus the bias of each output."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + place, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + place % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, narrow(total, out.dtype.element_ty).to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_tiles(
    out, codebook, indices, residual_codebook, residual_indices, outlier_codebook, outlier_indices,
    inverse, scale, shift,
    in_features, out_features, outlier_size, group_size, num_rows, line_length,
    entries, residual_entries, outlier_entries,
    GROUPS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, VO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The dense weight, `ROWS` vector rows and `COLUMNS` input columns a program.

    Columns run in the input's order, so that stores are whole lines; reads follow the inverse permutation.
    """
    dtype: tl.constexpr = codebook.dtype.element_ty
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    original = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = original < in_features
    position = original_columns(inverse, original, inside, in_features)
    weight = main_values(
        codebook, indices, residual_codebook, residual_indices, row, tl.maximum(position - outlier_size, 0),
        inside & (position >= outlier_size), num_rows, line_length, group_size, entries, residual_entries,
        True, GROUPS, BITS, RESIDUAL_BITS, VP,
    )  # fmt: skip
    if outlier_codebook is not None:
        outliers = outlier_values(
            outlier_codebook, outlier_indices, row, position, inside & (position < outlier_size), out_features,
            outlier_size, outlier_entries, V, VP, VO,
        )  # fmt: skip
        weight = tl.where((position < outlier_size)[None, :, None], outliers, weight)
    weight = normalized(weight, scale, shift, original, inside, dtype)
    element = tl.arange(0, VP)[None, None, :]
    output = row[:, None, None] * V + element
    mask = (element < V) & (output < out_features) & inside[None, :, None]
    place = output.to(tl.int64) * in_features + original[None, :, None]
    tl.store(out + place, weight.to(dtype), mask=mask)


@triton.jit
def invert(perm, inverse, count, BLOCK: tl.constexpr):
    """inverse[perm[p]] = p."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < count
    tl.store(inverse + original_columns(perm, position, inside, count), position, mask=inside)


@triton.jit
def reorder(x, out, perm, in_features, BLOCK: tl.constexpr):
    """out[t, p] = x[t, perm[p]]: the input's columns in quantized order."""
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = position < in_features
    line = tl.program_id(0).to(tl.int64) * in_features
    original = original_columns(perm, position, inside, in_features)
    tl.store(out + line + position, tl.load(x + line + original, mask=inside), mask=inside)


@triton.jit
def pad(codebook, out, count, V: tl.constexpr, VP: tl.constexpr, BLOCK: tl.constexpr):
    """`count` vectors of length V, each with zeros up to VP behind it."""
    vector = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    element = tl.arange(0, VP)[None, :]
    inside = vector < count
    value = tl.load(codebook + vector * V + element, mask=inside & (element < V), other=0.0)
    tl.store(out + vector * VP + element, value, mask=inside)
