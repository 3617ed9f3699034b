"""Launches the Triton kernels: grids, splits, scratch, and the tile for each.

Everything on the caller's stream and without waiting for it, so that a CUDA graph can hold a call. Scratch comes from
PyTorch's allocator, which knows about graphs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vptq.ops import triton_kernels as kernels
from vptq.ops.triton_layer import LayerSizes
from vptq.ops.triton_tiles import DENSE_TILES, MATRIX_TILES, VECTOR_TILES, Tile, fastest

Stored = dict[str, Tensor | None]
"""A layer's tensors by the kernels' parameter names."""
Grid = tuple[int, int, int]

VECTOR_PROGRAMS = 8
MATRIX_PROGRAMS = 2
"""Programs to aim for on a multiprocessor, by sharing a row's columns among them. Not measured on a GPU."""
_ADD_BLOCK = 512
_COPY_BLOCK = 1024
_PAD_BLOCK = 128


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1  # interpreted
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64)


def vector(x: Tensor, stored: Stored, bias: Tensor | None, sizes: LayerSizes) -> Tensor:
    """x W^T + bias for x [tokens, in_features], token by token."""
    stored = _padded(stored, sizes)

    def run(tile: Tile) -> Tensor:
        grid, arguments = _shared(tile, sizes, len(x), VECTOR_PROGRAMS * _multiprocessors(x.device))
        out, parts = _outputs(x, sizes, grid[1])
        kernels.multiply_vector[grid](
            x, out if parts is None else parts, bias, **stored, **sizes.arguments, **arguments
        )
        return _added(parts, out, bias)

    return run(fastest("multiply_vector", (*sizes.key, len(x)), VECTOR_TILES, x.device, run))


def tiles(x: Tensor, stored: Stored, bias: Tensor | None, sizes: LayerSizes) -> Tensor:
    """x W^T + bias for x [tokens, in_features], a block of tokens at a time."""
    block = min(64, max(16, 1 << (len(x) - 1).bit_length()))
    blocks = -(-len(x) // block)
    perm = stored["perm"]
    if perm is not None:
        x = _reordered(x, perm)
    stored = _padded(stored, sizes)

    def run(tile: Tile) -> Tensor:
        grid, arguments = _shared(tile, sizes, blocks, MATRIX_PROGRAMS * _multiprocessors(x.device))
        out, parts = _outputs(x, sizes, grid[1])
        kernels.multiply_tiles[grid](
            *(x, out if parts is None else parts, bias),
            **stored,
            **{"tokens": len(x), "TOKENS": block},
            **sizes.arguments,
            **arguments,
            num_stages=tile.stages,
            enable_fp_fusion=False,  # the weight is rounded where the format rounds
        )
        return _added(parts, out, bias)

    return run(fastest("multiply_tiles", (*sizes.key, block), MATRIX_TILES, x.device, run))


def dequantize(stored: Stored, sizes: LayerSizes) -> Tensor:
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


def _shared(tile: Tile, sizes: LayerSizes, layers: int, programs: int) -> tuple[Grid, dict[str, Any]]:
    """(Row blocks, splits, layers) and the arguments that go with a tile, to have about `programs` programs."""
    rows = tile.rows(sizes.arguments["VP"])
    blocks = -(-sizes.arguments["num_rows"] // rows)
    columns = sizes.arguments["in_features"] - sizes.arguments["outlier_size"]
    steps = -(-columns // tile.columns)
    wanted = max(1, min(steps, programs // (blocks * layers)))
    steps_each = -(-steps // wanted)
    splits = -(-steps // steps_each)  # none without work
    arguments = {"columns_a_split": steps_each * tile.columns, "WHOLE": splits == 1}
    return (blocks, splits, layers), arguments | {"ROWS": rows, "COLUMNS": tile.columns, "num_warps": tile.warps}


def _outputs(x: Tensor, sizes: LayerSizes, splits: int) -> tuple[Tensor, Tensor | None]:
    """Where the result goes, and where the splits' parts do if there are several."""
    shape = (len(x), sizes.arguments["out_features"])
    return x.new_empty(shape), x.new_empty((splits, *shape), dtype=torch.float32) if splits > 1 else None


def _added(parts: Tensor | None, out: Tensor, bias: Tensor | None) -> Tensor:
    if parts is not None:
        count = out.numel()
        kernels.add_parts[(-(-count // _ADD_BLOCK),)](
            parts, out, bias, len(parts), count, out.shape[1], BLOCK=_ADD_BLOCK
        )
    return out


def _reordered(x: Tensor, perm: Tensor) -> Tensor:
    out = torch.empty_like(x)
    grid = (len(x), -(-x.shape[1] // _COPY_BLOCK))
    kernels.reorder[grid](x, out, perm, x.shape[1], BLOCK=_COPY_BLOCK)
    return out


def _padded(stored: Stored, sizes: LayerSizes) -> Stored:
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
