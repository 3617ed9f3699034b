"""The gradient of `vptq::dequantize`: what trains codebooks, scales and biases for fixed indices.

A centroid collects the gradients of all vectors that use it, a scatter-add over the indices; a column's scale and bias
collect those of the column. Sums are float32 whatever the layer's dtype, in one order, so that
the same gradient gives the same bytes. Indices and permutation have none.

Only tensors are saved that the layer holds anyway: the dense weight is not among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vptq.ops import dense
from vptq.ops.scatter import add_by_index
from vptq.ops.schemas import LIBRARY
from vptq.packing import from_carrier

_CODEBOOK, _RESIDUAL, _OUTLIERS, _SCALE, _BIAS = 0, 2, 4, 7, 8  # positions among the operator's arguments


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.sizes = inputs[9:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """From the dense weight's gradient [out_features, in_features] to one for every argument."""
    stored, sizes = ctx.saved_tensors, ctx.sizes
    grads: list[Tensor | None] = [None] * 13
    grad = grad.float()
    if ctx.needs_input_grad[_BIAS]:
        grads[_BIAS] = grad.sum(0).to(stored[_BIAS].dtype)
    if ctx.needs_input_grad[_SCALE]:
        unscaled = torch.ops.vptq.dequantize.default(*stored[:7], None, None, *sizes)
        grads[_SCALE] = (grad * unscaled).sum(0).to(stored[_SCALE].dtype)
    if any(ctx.needs_input_grad[at] for at in (_CODEBOOK, _RESIDUAL, _OUTLIERS)):
        grad = grad if stored[_SCALE] is None else grad * stored[_SCALE]
        grad = grad if stored[6] is None else grad.index_select(1, from_carrier(stored[6]))
        for at, book in _codebook_gradients(grad, stored, vector_len=sizes[2], outlier_len=sizes[3]).items():
            grads[at] = book.to(stored[at].dtype)
    return tuple(grads)


def _codebook_gradients(
    grad: Tensor, stored: tuple[Tensor | None, ...], vector_len: int, outlier_len: int
) -> dict[int, Tensor]:
    """Position of a codebook -> its gradient, float32, from that of the lookups in quantized column order."""
    codebook, indices, residual, residual_indices, outliers, outlier_indices = stored[:6]
    assert codebook is not None
    assert indices is not None
    books, columns = {}, grad.shape[1]
    if outliers is not None and outlier_indices is not None:
        entries = from_carrier(outlier_indices)
        columns -= entries.shape[2]
        books[_OUTLIERS] = _scatter(grad[:, : entries.shape[2]], entries, outliers, outlier_len)
    some = grad[:, grad.shape[1] - columns :]
    size = columns // codebook.shape[0]
    main, rest = dense.entries(codebook, indices, residual, residual_indices, size, vector_len)
    books[_CODEBOOK] = _scatter(some, main, codebook, vector_len)
    if residual is not None and rest is not None:
        books[_RESIDUAL] = _scatter(some, rest, residual, vector_len)
    return books


def _scatter(grad: Tensor, entries: Tensor, codebook: Tensor, vector_len: int) -> Tensor:
    """[G, K * v] float32: sums of the vectors of grad [out_features, G * S] by their entries [G, R, S]."""
    groups, rows, size = entries.shape
    padded = functional.pad(grad, (0, 0, 0, rows * vector_len - grad.shape[0]))
    vectors = padded.view(rows, vector_len, groups, size).permute(2, 0, 3, 1)
    sums = torch.zeros(groups, codebook.shape[1] // vector_len, vector_len, device=grad.device)
    for group in range(groups):
        add_by_index(sums[group], entries[group].flatten(), vectors[group].reshape(-1, vector_len))
    return sums.flatten(1)


torch.library.register_autograd("vptq::dequantize", _backward, setup_context=_remember, lib=LIBRARY)
