"""The operators' schemas and fakes: what every backend implements, and what compilers see of it.

One schema per job, declared here once; backends only add implementations to it, so the dispatcher picks the kernel and
no code asks which device it is on. `Library.define` and `Library.impl` rather than `torch.library.custom_op`: the
latter costs twice the overhead per call, and a 7B model makes 224 calls a token.

The tensors are those of `vptq.config.tensor_specs`, in its dtypes (so int32 indices are packed, int16 ones are not);
an absent tensor is None. Sizes that the shapes imply are not passed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vptq.errors import ConfigError

_STORED = (
    "Tensor codebook, Tensor indices, Tensor? residual_codebook, Tensor? residual_indices, "
    "Tensor? outlier_codebook, Tensor? outlier_indices, Tensor? perm, Tensor? weight_scale, Tensor? weight_bias"
)
_SIZES = "int in_features, int out_features, int vector_len, int outlier_vector_len"

# Kept alive for the process: the registrations go when the object does.
LIBRARY: Any = torch.library.Library("vptq", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(f"dequantize({_STORED}, {_SIZES}) -> Tensor")
LIBRARY.define(f"linear(Tensor x, {_STORED}, Tensor? bias, {_SIZES}, str codebook_form='') -> Tensor")
LIBRARY.define("linear_group(Tensor x, Tensor?[] tensors, int[] sizes) -> Tensor")
LIBRARY.define("nearest(Tensor vectors, Tensor codebook, int beam=1) -> (Tensor, Tensor)")
LIBRARY.define(
    "assign_columns(Tensor base, Tensor? coupling, Tensor? present, Tensor scale, Tensor shift, Tensor main, "
    "Tensor? residual, Tensor(a!) indices, Tensor(b!)? residual_indices, int beam, Tensor? row_weights=None) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define("add_products(Tensor(a!) sums, Tensor left, Tensor right, bool upper=False) -> ()")

CODEBOOK_FORMS = ("exact", "int8")
"""What kernels may make of codebooks: nothing, or bytes, where they have a faster way to look those up. An empty form
leaves it to the environment variable VPTQ_CPU_CODEBOOK, and that to "exact"."""

OPERATORS = ("dequantize", "linear", "linear_group", "nearest", "assign_columns", "add_products")


def check_input(x: Tensor, codebook: Tensor, in_features: int) -> None:
    """What a linear layer demands of its input.

    Raises:
        ConfigError: The input has the wrong width or dtype.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ConfigError(
            f"the input has shape {tuple(x.shape)}; its last dimension must be in_features, {in_features}"
        )
    if x.dtype != codebook.dtype:
        raise ConfigError(f"the input is {x.dtype}, the layer {codebook.dtype}; cast one of them with .to(dtype)")


def check_codebook_form(form: str) -> None:
    """Raises ConfigError for anything but one of `CODEBOOK_FORMS`, or nothing."""
    if form and form not in CODEBOOK_FORMS:
        raise ConfigError(f"the codebook form is {form!r}; allowed are {' and '.join(CODEBOOK_FORMS)}")


def _fake_dequantize(
    codebook: Tensor,
    indices: Tensor,
    residual_codebook: Tensor | None,
    residual_indices: Tensor | None,
    outlier_codebook: Tensor | None,
    outlier_indices: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    in_features: int,
    out_features: int,
    vector_len: int,
    outlier_vector_len: int,
) -> Tensor:
    return codebook.new_empty(out_features, in_features)


def _fake_linear(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    residual_codebook: Tensor | None,
    residual_indices: Tensor | None,
    outlier_codebook: Tensor | None,
    outlier_indices: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    vector_len: int,
    outlier_vector_len: int,
    codebook_form: str = "",
) -> Tensor:
    check_input(x, codebook, in_features)
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_linear_group(x: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    return x.new_empty(x.numel() // sizes[0] * sum(sizes[1::4]))


def _fake_nearest(vectors: Tensor, codebook: Tensor, beam: int = 1) -> tuple[Tensor, Tensor]:
    shape = (vectors.shape[0], beam)
    return vectors.new_empty(shape, dtype=torch.int64), vectors.new_empty(shape)


def _fake_assign_columns(base: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base), torch.empty_like(base)


def _fake_add_products(sums: Tensor, left: Tensor, right: Tensor, upper: bool = False) -> None:
    return None


_FAKES: tuple[Callable[..., Any], ...] = (
    *(_fake_dequantize, _fake_linear, _fake_linear_group, _fake_nearest, _fake_assign_columns, _fake_add_products),
)
for _name, _fake in zip(OPERATORS, _FAKES, strict=True):
    torch.library.register_fake(f"vptq::{_name}", _fake, lib=LIBRARY)
