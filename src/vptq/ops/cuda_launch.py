"""Launches the CUDA decode kernel, on the caller's stream and without waiting for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from vptq.ops import cuda_compile, cuda_plan
from vptq.ops.triton_layer import Layer, Pointers

_failed: set[object] = set()


def decode(x: Tensor, layers: Sequence[Layer]) -> Tensor | None:
    """x W^T + bias of layers for x [1 to 8 tokens, in_features] by one launch, or None where Triton has to do it.

    That is where the kernels cannot be compiled, which is told once, and in the capture of a CUDA graph before layers
    of this kind were ever run.

    Args:
        x: Contiguous.
        layers: Up to `cuda_plan.LAYERS`, alike (see `LayerSizes.is_like`); `cuda_plan.obstacle` has nothing against
            them.

    Returns:
        Each layer's [tokens, out_features] after the other's, flat.
    """
    sizes, rows = layers[0].sizes, tuple(layer.sizes.arguments["out_features"] for layer in layers)
    card = cuda_compile.card(x.device)
    kind = cuda_plan.layer_kind(sizes, card)
    if kind is None or kind in _failed or not all(_readable(layer.stored) for layer in layers):
        return None
    common = sizes.arguments
    plan = cuda_plan.plan(kind, len(x), rows, common["GROUPS"], common["group_size"], card)
    try:
        kernels = cuda_compile.kernels(kind, plan.tokens, x.device)
    except Exception as error:  # NVRTC, the driver and cuda-core each have their own errors
        _failed.add(kind)
        logging.getLogger("vptq").warning("Triton runs in place of the CUDA decode kernel: %s", error)
        return None
    if kernels is None:
        return None
    multiply, add_parts = kernels
    out = x.new_empty(len(x) * sum(rows))
    slices = plan.grid[1]
    parts = x.new_empty((slices, out.numel()), dtype=torch.float32) if slices > 1 else None
    arguments: list[Tensor | int | None] = [x, out, parts, len(x)]
    arguments += [common[name] for name in ("in_features", "group_size", "line_length")]
    arguments += [plan.columns, plan.slices_a_group, plan.across, out.numel()]
    for layer, blocks in zip(layers, plan.blocks, strict=True):
        arguments += [layer.bias, *(layer.stored[name] for name in _POINTERS)]
        arguments += [layer.sizes.arguments["out_features"], layer.sizes.arguments["num_rows"], blocks]
    arguments += [*[None] * (1 + len(_POINTERS)), 0, 0, 0] * (cuda_plan.LAYERS - len(layers))
    multiply(plan.grid, plan.threads, plan.shared_bytes, arguments)
    if parts is not None:
        add_parts((-(-out.numel() // _ADD_THREADS),), _ADD_THREADS, 0, (parts, out, slices, out.numel()))
    return out


def _readable(stored: Pointers) -> bool:
    """Whether whole vectors can be loaded (a codebook that is a view may begin anywhere), and the permutation read."""
    perm, books = stored["perm"], (stored["codebook"], stored["residual_codebook"])
    narrow = perm is None or perm.dtype == torch.int16
    return narrow and all(book is None or book.data_ptr() % 16 == 0 for book in books)


_POINTERS = ("codebook", "indices", "residual_codebook", "perm", "scale", "shift")
_ADD_THREADS = 256
