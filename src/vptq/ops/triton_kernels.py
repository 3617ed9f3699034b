"""The Triton kernels: a vector times a layer, a few vectors on tensor cores, and the dense weight.

Sums run over columns, which several programs share where a layer has too few rows to fill a GPU; each writes its part
and `add_parts` adds them in one order, so that the same input gives the same bytes. No atomics, no scratch to clear.
Names in capitals are compile-time constants: what is fixed for a layer (vector length, index bits), and the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Layer(NamedTuple):
    """One of the layers of a launch, as a kernel takes it: pointers, rows, and how many blocks of rows they are."""

    bias: Any
    codebook: Any
    indices: Any
    residual_codebook: Any
    residual_indices: Any
    outlier_codebook: Any
    outlier_indices: Any
    perm: Any
    scale: Any
    shift: Any
    out_features: Any
    num_rows: Any
    blocks: Any


@triton.jit
def multiply_vector(
    x, out, layers, outputs,
    in_features, outlier_size, group_size, line_length, entries, residual_entries, outlier_entries, columns_a_split,
    GROUPS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, VO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Outputs of layers that read the same input, each [tokens, out_features] after the other's; `outputs` in all.

    The grid is (row blocks of all layers, splits, tokens). Several splits write parts, each behind the other.
    """
    block = tl.program_id(0)
    out += tl.program_id(1).to(tl.int64) * outputs
    for number in tl.static_range(len(layers)):
        layer = layers[number]
        if (block >= 0) & (block < layer.blocks):
            multiply_rows(
                x, out, layer, block * ROWS + tl.arange(0, ROWS),
                in_features, outlier_size, group_size, line_length, entries, residual_entries, outlier_entries,
                columns_a_split, GROUPS, BITS, RESIDUAL_BITS, V, VP, VO, COLUMNS,
            )  # fmt: skip
        block -= layer.blocks
        out += tl.num_programs(2).to(tl.int64) * layer.out_features


@triton.jit
def multiply_rows(
    x, out, layer, row,
    in_features, outlier_size, group_size, line_length, entries, residual_entries, outlier_entries, columns_a_split,
    GROUPS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token's outputs of a layer's vector rows over one split's columns, in float32 throughout.

    Permutation, scale and bias of the columns go into the input, as many times as there are row blocks, and the weights
    stay bare: w x = q (s x) + b x. The first split adds the bias of the outputs.
    """
    split, token = tl.program_id(1), tl.program_id(2)
    x += token.to(tl.int64) * in_features
    sums = tl.zeros([row.shape[0], COLUMNS, VP], tl.float32)
    shifted = tl.zeros([COLUMNS], tl.float32)
    last = tl.minimum((split + 1) * columns_a_split, in_features - outlier_size)
    for first in range(split * columns_a_split, last, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < last
        original = original_columns(layer.perm, column + outlier_size, inside, in_features)
        value = tl.load(x + original, mask=inside, other=0.0).to(tl.float32)
        if layer.shift is not None:
            shifted += value * tl.load(layer.shift + original, mask=inside, other=0.0).to(tl.float32)
        if layer.scale is not None:
            value *= tl.load(layer.scale + original, mask=inside, other=0.0).to(tl.float32)
        sums += value[None, :, None] * main_values(
            layer.codebook, layer.indices, layer.residual_codebook, layer.residual_indices, row, column, inside,
            layer.num_rows, line_length, group_size, entries, residual_entries, False, GROUPS, BITS, RESIDUAL_BITS, VP,
        )  # fmt: skip
    total = tl.sum(sums, 1) + tl.sum(shifted, 0)
    if layer.outlier_codebook is not None:
        for first in range(split * OUTLIER_COLUMNS, outlier_size, tl.num_programs(1) * OUTLIER_COLUMNS):
            column = first + tl.arange(0, OUTLIER_COLUMNS)
            inside = column < outlier_size
            original = original_columns(layer.perm, column, inside, in_features)
            value = tl.load(x + original, mask=inside, other=0.0).to(tl.float32)
            if layer.shift is not None:
                total += tl.sum(value * tl.load(layer.shift + original, mask=inside, other=0.0).to(tl.float32), 0)
            if layer.scale is not None:
                value *= tl.load(layer.scale + original, mask=inside, other=0.0).to(tl.float32)
            weight = outlier_values(
                layer.outlier_codebook, layer.outlier_indices, row, column, inside, layer.out_features, outlier_size,
                outlier_entries, V, VP, VO,
            )  # fmt: skip
            total += tl.sum(value[None, :, None] * weight, 1)
    element = tl.arange(0, VP)[None, :]
    output = row[:, None] * V + element
    mask = (element < V) & (output < layer.out_features)
    if layer.bias is not None:  # noqa: SIM102 (decided when compiling)
        if split == 0:
            total += tl.load(layer.bias + output, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    out += token.to(tl.int64) * layer.out_features
    tl.store(out + output, narrow(total, dtype).to(dtype), mask=mask)


@triton.jit
def multiply_tiles(
    x, out, bias, codebook, indices, residual_codebook, residual_indices, outlier_codebook, outlier_indices,
    perm, scale, shift,
    tokens, in_features, out_features, outlier_size, group_size, num_rows, line_length,
    entries, residual_entries, outlier_entries, columns_a_split,
    GROUPS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, VO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Outputs of `TOKENS` tokens and `ROWS` vector rows over one split's columns, on tensor cores.

    The grid is (row blocks, splits, token blocks). x has its columns in quantized order. A tile of the weight is made
    as `dequantize` makes it, and multiplied while it is at hand. Several splits write parts, each behind the other; the
    first adds the bias.
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
    if bias is not None:  # noqa: SIM102 (likewise)
        if split == 0:
            sums += tl.load(bias + output, mask=mask, other=0.0).to(tl.float32)
    place = (split.to(tl.int64) * tokens + token) * out_features + output
    tl.store(out + place, narrow(sums, out.dtype.element_ty).to(out.dtype.element_ty), mask=mask & present)


@triton.jit
def add_parts(parts, out, splits, count, BLOCK: tl.constexpr):
    """out [count] = the sum of parts [splits, count] in their order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + place, mask=inside, other=0.0)
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
