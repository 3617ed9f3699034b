"""Launches the CUDA decode kernel, on the caller's stream and without waiting for it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vptq.ops import cuda_compile, cuda_plan
from vptq.ops.triton_layer import LayerSizes

_failed: set[object] = set()


def decode(x: Tensor, stored: dict[str, Tensor | None], bias: Tensor | None, sizes: LayerSizes) -> Tensor | None:
    """x W^T + bias for x [1 to 8 tokens, in_features], or None where Triton has to do it.

    That is where the kernels cannot be compiled, which is told once, and in the capture of a CUDA graph before a layer
    of this kind was ever run.

    Args:
        x: Contiguous.
        stored: The layer's tensors by the Triton kernels' parameter names, contiguous.
        bias: [out_features], contiguous, or None.
        sizes: Of the layer; `cuda_plan.obstacle` has nothing against it.
    """
    card = cuda_compile.card(x.device)
    kind = cuda_plan.layer_kind(sizes, card)
    perm = stored["perm"]
    if kind is None or kind in _failed or (perm is not None and perm.dtype != torch.int16) or not _aligned(stored):
        return None
    arguments = sizes.arguments
    plan = cuda_plan.plan(kind, len(x), arguments["out_features"], arguments["GROUPS"], arguments["group_size"], card)
    try:
        kernels = cuda_compile.kernels(kind, plan.tokens, x.device)
    except Exception as error:  # NVRTC, the driver and cuda-core each have their own errors
        _failed.add(kind)
        logging.getLogger("vptq").warning("Triton runs in place of the CUDA decode kernel: %s", error)
        return None
    if kernels is None:
        return None
    multiply, add_parts = kernels
    shape = (len(x), arguments["out_features"])
    out = x.new_empty(shape)
    slices = plan.grid[1]
    parts = x.new_empty((slices, *shape), dtype=torch.float32) if slices > 1 else None
    names = ("codebook", "indices", "residual_codebook", "perm", "scale", "shift")
    multiply(
        plan.grid,
        plan.threads,
        plan.shared_bytes,
        (
            *(x, out, parts, bias, *(stored[name] for name in names), len(x)),
            *(arguments[name] for name in ("in_features", "out_features", "group_size", "num_rows", "line_length")),
            *(plan.columns, plan.slices_a_group, plan.across),
        ),
    )
    if parts is not None:
        blocks = -(-out.numel() // _ADD_THREADS)
        add_parts((blocks,), _ADD_THREADS, 0, (parts, out, bias, slices, out.numel(), shape[1]))
    return out


def _aligned(stored: dict[str, Tensor | None]) -> bool:
    """Whether whole vectors can be loaded; a codebook that is a view into something else may begin anywhere."""
    books = (stored["codebook"], stored["residual_codebook"])
    return all(book is None or book.data_ptr() % 16 == 0 for book in books)


_ADD_THREADS = 256
