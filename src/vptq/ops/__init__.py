"""The operators: `linear`, `linear_group`, `dequantize`, `nearest`, `assign_columns`, `add_products`; on every device.

Each is one `torch.library` schema (`vptq::linear`, ...) with a PyTorch implementation for every device and faster ones
where a backend has them; see `schemas` for the contract, `backends` for the choice. The functions here give them
types, defaults and documentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vptq.ops import columns, dense, gradients, group, products, search  # noqa: F401 (register themselves)
from vptq.ops.backends import BackendStatus, backends, tell_when_missed

__all__ = [
    "BackendStatus",
    "add_products",
    "assign_columns",
    "backends",
    "dequantize",
    "linear",
    "linear_group",
    "nearest",
]

tell_when_missed(
    {"linear": dense.linear, "nearest": search.nearest, "assign_columns": columns.assign_columns}
)  # dequantize has no other implementation on a CPU, and linear tells for it elsewhere


def dequantize(
    codebook: Tensor,
    indices: Tensor,
    residual_codebook: Tensor | None = None,
    residual_indices: Tensor | None = None,
    outlier_codebook: Tensor | None = None,
    outlier_indices: Tensor | None = None,
    perm: Tensor | None = None,
    weight_scale: Tensor | None = None,
    weight_bias: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
    vector_len: int,
    outlier_vector_len: int = 0,
) -> Tensor:
    """The dense weight of a layer, bit for bit what the format means.

    Args:
        codebook: [G, K * v] in the layer's float dtype.
        indices: Packed int32 [G, R, words], holding both stages; or unpacked int16 [G, R, S].
        residual_codebook: [G, Kr * v], or None.
        residual_indices: int16 [G, R, S] when `indices` is unpacked, else None.
        outlier_codebook: [1, Ko * vo], or None.
        outlier_indices: int16 [1, Ro, L], or None.
        perm: int16 or int64 [in_features], or None.
        weight_scale: [in_features], or None.
        weight_bias: [in_features], or None.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        vector_len: v.
        outlier_vector_len: vo; 0 without outliers.

    Returns:
        [out_features, in_features] in the codebook's dtype.
    """
    result: Tensor = torch.ops.vptq.dequantize.default(
        codebook,
        indices,
        residual_codebook,
        residual_indices,
        outlier_codebook,
        outlier_indices,
        perm,
        weight_scale,
        weight_bias,
        in_features,
        out_features,
        vector_len,
        outlier_vector_len,
    )
    return result


def linear(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    residual_codebook: Tensor | None = None,
    residual_indices: Tensor | None = None,
    outlier_codebook: Tensor | None = None,
    outlier_indices: Tensor | None = None,
    perm: Tensor | None = None,
    weight_scale: Tensor | None = None,
    weight_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
    vector_len: int,
    outlier_vector_len: int = 0,
    codebook_form: str = "",
) -> Tensor:
    """x W^T + bias with the weight that `dequantize` describes.

    Args:
        x: [..., in_features] in the codebook's dtype.
        codebook: This and the following as for `dequantize`.
        indices: See there.
        residual_codebook: See there.
        residual_indices: See there.
        outlier_codebook: See there.
        outlier_indices: See there.
        perm: See there.
        weight_scale: See there.
        weight_bias: See there.
        bias: [out_features], or None.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        vector_len: v.
        outlier_vector_len: vo; 0 without outliers.
        codebook_form: "exact"; "int8" to let the kernel for a single token round codebooks to bytes where that is
            faster; or empty for what VPTQ_CPU_CODEBOOK says.

    Returns:
        [..., out_features] in the codebook's dtype.

    Raises:
        ConfigError: `x` has the wrong width or dtype.
    """
    result: Tensor = torch.ops.vptq.linear.default(
        x,
        codebook,
        indices,
        residual_codebook,
        residual_indices,
        outlier_codebook,
        outlier_indices,
        perm,
        weight_scale,
        weight_bias,
        bias,
        in_features,
        out_features,
        vector_len,
        outlier_vector_len,
        codebook_form,
    )
    return result


def linear_group(x: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """`linear` of several layers with the same input: one launch on a GPU, for few tokens and layers that are alike.

    Args:
        x: [..., in_features] in the layers' dtype.
        tensors: Ten of each layer: the nine that `dequantize` takes, and its bias.
        sizes: Four of each layer: in_features, out_features, vector_len, outlier_vector_len.

    Returns:
        The layers' outputs [..., out_features] one after the other, flat.

    Raises:
        ConfigError: `x` has the wrong width or dtype.
    """
    result: Tensor = torch.ops.vptq.linear_group.default(x, tensors, sizes)
    return result


def nearest(vectors: Tensor, codebook: Tensor, beam: int = 1) -> tuple[Tensor, Tensor]:
    """The nearest centroids of every vector in squared Euclidean distance: exhaustive, deterministic.

    Two centroids rank either way when their distances differ by less than the float32 rounding of |x|^2 + |c|^2,
    measured from the codebook's middle (the PyTorch search is stricter: the rounding of |x - c|^2 itself). NaN ranks
    last.

    Args:
        vectors: float32 [N, v]; N may be 0.
        codebook: float32 [K, v].
        beam: How many centroids per vector, 1..K.

    Returns:
        Indices int64 [N, beam] by rising distance, equal distances by rising index; and float32 distances
        |x - c|^2 of the same shape.

    Raises:
        ConfigError: Shapes, dtypes or `beam` do not fit (RuntimeError from the C++ kernel).
    """
    result: tuple[Tensor, Tensor] = torch.ops.vptq.nearest.default(vectors, codebook, beam)
    return result


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
    """Chooses centroids for `n` weight columns, one after another, each seeing the errors of those before it.

    For column p: target_p = base_p + sum over q < p of coupling[p, q] errors_q; its vectors, (target_p - shift_p) /
    scale_p cut into runs of v rows, take their nearest centroids; errors_p = values_p - target_p, or values_p -
    present_p where `present` is given.

    Args:
        base: float32 [n, rows].
        coupling: float32 [n, n], read below its diagonal; None where columns do not see each other.
        present: float32 [n, rows], what the indices stand for now; a vector then keeps them unless it finds nearer
            ones.
        scale: float32 [n], not zero.
        shift: float32 [n].
        main: float32 [K, v].
        residual: float32 [Kr, v], whose entries are added to those of `main`, or None.
        indices: int64 [n, ceil(rows / v)], written in place (and read where `present` is given).
        residual_indices: The same for `residual`, or None.
        beam: At least so many main centroids are tried with their best residual centroid; 1 is greedy, K exact. Sizes
            above K count as K.
        row_weights: float32 [rows], not negative: what the squared error of a row counts in the distance of a vector
            to its centroid. None where all rows count alike.

    Returns:
        Values and errors, float32 [n, rows].

    Raises:
        ConfigError: Shapes, dtypes or `beam` do not fit (RuntimeError from the C++ kernel).
    """
    result: tuple[Tensor, Tensor] = torch.ops.vptq.assign_columns.default(
        base, coupling, present, scale, shift, main, residual, indices, residual_indices, beam, row_weights
    )
    return result


def add_products(sums: Tensor, left: Tensor, right: Tensor, *, upper: bool = False) -> None:
    """sums += left^T right, in place: sums in float32, products of numbers rounded to bfloat16 where that is quicker.

    Args:
        sums: float32 [n, m], contiguous.
        left: [N, n], float32 or bfloat16 (PyTorch's code takes any float dtype).
        right: [N, m], likewise.
        upper: What lies below the diagonal of the sums may be left out, or not.

    Raises:
        ConfigError: Shapes do not fit (RuntimeError from the C++ kernel, for dtypes as well).
    """
    torch.ops.vptq.add_products.default(sums, left, right, upper)
