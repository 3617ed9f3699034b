"""Launches the Triton kernels: grids, splits, scratch, and the tile for each.

Everything on the caller's stream and without waiting for it, so that a CUDA graph can hold a call. Scratch comes from
PyTorch's allocator, which knows about graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vptq.ops import devices
from vptq.ops import triton_kernels as kernels
from vptq.ops.triton_layer import Layer, LayerSizes, Pointers
from vptq.ops.triton_tiles import DENSE_TILES, MATRIX_TILES, VECTOR_TILES, Tile, fastest

Grid = tuple[int, int, int]

VECTOR_PROGRAMS = 8
MATRIX_PROGRAMS = 2
"""Programs to aim for on a multiprocessor, by sharing a row's columns among them. Not measured on a GPU."""
_ADD_BLOCK = 512
_COPY_BLOCK = 1024
_PAD_BLOCK = 128


def vector(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """x W^T + bias of layers for x [tokens, in_features] by one launch, token by token.

    Args:
        x: Contiguous.
        layers: Alike, see `LayerSizes.is_like`.

    Returns:
        Each layer's [tokens, out_features] after the other's, flat.
    """
    sizes = layers[0].sizes
    rows = [layer.sizes.arguments["out_features"] for layer in layers]
    padded = [layer._replace(stored=_padded(layer.stored, layer.sizes)) for layer in layers]

    def run(tile: Tile) -> Tensor:
        own = tuple(_for_kernel(layer, tile) for layer in padded)
        blocks = (sum(layer.blocks for layer in own), len(x))
        grid, arguments = _shared(tile, sizes, blocks, VECTOR_PROGRAMS * devices.multiprocessors(x.device))
        out, parts = _outputs(x, len(x) * sum(rows), grid[1])
        target = out if parts is None else parts
        kernels.multiply_vector[grid](x, target, own, out.numel(), **sizes.common, **arguments)
        return _added(parts, out)

    return run(fastest("multiply_vector", (*sizes.key, *rows[1:], len(x)), VECTOR_TILES, x.device, run))


def tiles(x: Tensor, layer: Layer) -> Tensor:
    """x W^T + bias [tokens, out_features] for x [tokens, in_features], a block of tokens at a time; flat."""
    stored, bias, sizes = layer
    block = min(64, max(16, 1 << (len(x) - 1).bit_length()))
    blocks = -(-len(x) // block)
    perm = stored["perm"]
    if perm is not None:
        x = _reordered(x, perm)
    stored = _padded(stored, sizes)

    def run(tile: Tile) -> Tensor:
        programs = MATRIX_PROGRAMS * devices.multiprocessors(x.device)
        grid, arguments = _shared(tile, sizes, (_row_blocks(tile, sizes), blocks), programs)
        out, parts = _outputs(x, len(x) * sizes.arguments["out_features"], grid[1])
        kernels.multiply_tiles[grid](
            *(x, out if parts is None else parts, bias),
            **stored,
            **{"tokens": len(x), "TOKENS": block},
            **sizes.arguments,
            **arguments,
            num_stages=tile.stages,
            enable_fp_fusion=False,  # the weight is rounded where the format rounds
        )
        return _added(parts, out)

    return run(fastest("multiply_tiles", (*sizes.key, block), MATRIX_TILES, x.device, run))


def dequantize(stored: Pointers, sizes: LayerSizes) -> Tensor:
    """The dense weight [out_features, in_features]."""
    codebook, perm = stored["codebook"], stored["perm"]
    assert codebook is not None
    columns, outputs = sizes.arguments["in_features"], sizes.arguments["out_features"]
    out = codebook.new_empty(outputs, columns)
    inverse = None
    if perm is not None:
        inverse = perm.new_empty(columns, dtype=torch.int32)
        kernels.invert[(-(-columns // _COPY_BLOCK),)](perm, inverse, columns, BLOCK=_COPY_BLOCK)
    tensors = {name: tensor for name, tensor in _padded(stored, sizes).items() if name != "perm"}

    def run(tile: Tile) -> None:
        rows = tile.rows(sizes.arguments["VP"])
        kernels.dequantize_tiles[(-(-columns // tile.columns), -(-sizes.arguments["num_rows"] // rows))](
            out,
            **tensors,
            inverse=inverse,
            **sizes.arguments,
            **{"ROWS": rows, "COLUMNS": tile.columns, "num_warps": tile.warps},
            enable_fp_fusion=False,  # scale and bias round one after the other
        )

    run(fastest("dequantize_tiles", sizes.key, DENSE_TILES, out.device, run))
    return out


def _for_kernel(layer: Layer, tile: Tile) -> kernels.Layer:
    rows = {name: layer.sizes.arguments[name] for name in ("out_features", "num_rows")}
    return kernels.Layer(layer.bias, **layer.stored, **rows, blocks=_row_blocks(tile, layer.sizes))


def _row_blocks(tile: Tile, sizes: LayerSizes) -> int:
    return -(-sizes.arguments["num_rows"] // tile.rows(sizes.arguments["VP"]))


def _shared(tile: Tile, sizes: LayerSizes, blocks: tuple[int, int], programs: int) -> tuple[Grid, dict[str, Any]]:
    """The grid and the arguments that go with a tile, to have about `programs` programs.

    Args:
        tile: What a program takes at a time.
        sizes: Of a layer; its columns are shared.
        blocks: Of rows and of tokens. The grid has splits of the columns in between.
        programs: Wanted.
    """
    columns = sizes.arguments["in_features"] - sizes.arguments["outlier_size"]
    steps = -(-columns // tile.columns)
    wanted = max(1, min(steps, programs // (blocks[0] * blocks[1])))
    steps_each = -(-steps // wanted)
    splits = -(-steps // steps_each)
    arguments = {"columns_a_split": steps_each * tile.columns, "ROWS": tile.rows(sizes.arguments["VP"])}
    return (blocks[0], splits, blocks[1]), arguments | {"COLUMNS": tile.columns, "num_warps": tile.warps}


def _outputs(x: Tensor, count: int, splits: int) -> tuple[Tensor, Tensor | None]:
    """Where the result goes, and where the splits' parts do if there are several."""
    return x.new_empty(count), x.new_empty((splits, count), dtype=torch.float32) if splits > 1 else None


def _added(parts: Tensor | None, out: Tensor) -> Tensor:
    if parts is not None:
        count = out.numel()
        kernels.add_parts[(-(-count // _ADD_BLOCK),)](parts, out, len(parts), count, BLOCK=_ADD_BLOCK)
    return out


def _reordered(x: Tensor, perm: Tensor) -> Tensor:
    out = torch.empty_like(x)
    grid = (len(x), -(-x.shape[1] // _COPY_BLOCK))
    kernels.reorder[grid](x, out, perm, x.shape[1], BLOCK=_COPY_BLOCK)
    return out


def _padded(stored: Pointers, sizes: LayerSizes) -> Pointers:
    """The same with the codebooks' vectors padded to a power of two.

    At each call, because a codebook may have been trained since the last one. It is small: a launch, against three or
    four times as many loads in the kernel after it, whose vectors would not be aligned.
    """
    length, padded_length = sizes.arguments["V"], sizes.arguments["VP"]
    if length == padded_length:
        return stored
    result = dict(stored)
    for name in ("codebook", "residual_codebook"):
        book = stored[name]
        if book is not None:
            count = book.numel() // length
            result[name] = out = book.new_empty(count * padded_length)
            grid = (-(-count // _PAD_BLOCK),)
            kernels.pad[grid](book, out, count, V=length, VP=padded_length, BLOCK=_PAD_BLOCK)
    return result
