"""A stored layer as the Triton kernels see it: its sizes, checked once for each combination of shapes.

A kernel believes what it is told, and a wrong shape would read foreign memory; but 224 layers a token leave no time to
check the same shapes again, so the answer is remembered by shapes and dtypes. Nothing here reads a tensor's contents:
that would wait for the GPU, and end a CUDA graph's capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vptq.config import FLOAT_DTYPES, MAX_CENTROIDS
from vptq.errors import ConfigError

Pointers = dict[str, Tensor | None]
"""A layer's tensors by the kernels' parameter names."""
Signature = tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
_NAMES = (
    *("codebook", "indices", "residual_codebook", "residual_indices", "outlier_codebook", "outlier_indices"),
    *("perm", "weight_scale", "weight_bias"),
)


@dataclass(frozen=True)
class LayerSizes:
    """What the kernels take besides pointers.

    Attributes:
        arguments: Sizes by parameter name, run-time and compile-time ones, as all kernels take them.
        dtype: The layer's float dtype.
    """

    arguments: dict[str, int]
    dtype: torch.dtype

    @property
    def key(self) -> tuple[object, ...]:
        """What of it decides how fast a tile is, for tuning."""
        names = ("out_features", "in_features", "V", "BITS", "RESIDUAL_BITS", "entries", "residual_entries")
        return (str(self.dtype).removeprefix("torch."), *(self.arguments[name] for name in names))

    @property
    def common(self) -> dict[str, int]:
        """Those that do not depend on the layer's rows."""
        return {name: value for name, value in self.arguments.items() if name not in ("out_features", "num_rows")}

    def is_like(self, other: LayerSizes) -> bool:
        """Whether one launch can serve both: layers that differ in nothing but their rows."""
        return self.dtype == other.dtype and self.common == other.common


class Layer(NamedTuple):
    """A layer as the launchers take it.

    Attributes:
        stored: Its tensors by the kernels' parameter names, contiguous.
        bias: [out_features], contiguous, or None.
        sizes: Of it, checked.
    """

    stored: Pointers
    bias: Tensor | None
    sizes: LayerSizes


def signature(stored: tuple[Tensor | None, ...]) -> Signature:
    """Shapes and dtypes of a layer's tensors, hashable."""
    return tuple(None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in stored)


@lru_cache(maxsize=1024)
def layer_sizes(stored: Signature, in_features: int, out_features: int, v: int, outlier_v: int) -> LayerSizes:
    """Sizes of the layer whose nine tensors have these shapes and dtypes.

    Raises:
        ConfigError: The tensors contradict each other or the sizes.
    """
    tensors = dict(zip(_NAMES, stored, strict=True))
    codebook, indices = tensors["codebook"], tensors["indices"]
    assert codebook is not None
    assert indices is not None
    dtype = codebook[1]
    _require(dtype in FLOAT_DTYPES, f"the codebook is {dtype}; it must be float16, bfloat16 or float32")
    _require(min(in_features, out_features, v) >= 1, f"a layer of {out_features} x {in_features}, vectors of {v}")
    outliers = tensors["outlier_indices"]
    _together(tensors, "outlier_codebook", "outlier_indices")
    _together(tensors, "weight_scale", "weight_bias")
    outlier_size = 0 if outliers is None else outliers[0][-1]
    groups, rows = codebook[0][0], -(-out_features // v)
    columns = in_features - outlier_size
    _require(columns >= groups and columns % groups == 0, f"{columns} columns cannot be shared by {groups} codebooks")
    entries = _entries(tensors, "codebook", groups, v, dtype)
    residual_entries = _entries(tensors, "residual_codebook", groups, v, dtype)
    outlier_entries = _entries(tensors, "outlier_codebook", 1, outlier_v, dtype)
    packed = indices[1] == torch.int32
    bits = _bits(entries) if packed else 0
    residual_bits = _bits(residual_entries) if packed and residual_entries else 0
    length = -(-(columns // groups) * (bits + residual_bits) // 32) if packed else columns // groups
    _shaped(tensors, "indices", (groups, rows, length), (torch.int32, torch.int16))
    if packed:
        _require(tensors["residual_indices"] is None, "packed indices hold the residual ones; there must be no others")
    else:
        _together(tensors, "residual_codebook", "residual_indices")
        _shaped(tensors, "residual_indices", (groups, rows, length), (torch.int16,))
    if outlier_v:
        _shaped(tensors, "outlier_indices", (1, -(-out_features // outlier_v), outlier_size), (torch.int16,))
    _shaped(tensors, "perm", (in_features,), (torch.int16, torch.int64))
    _shaped(tensors, "weight_scale", (in_features,), (dtype,))
    _shaped(tensors, "weight_bias", (in_features,), (dtype,))
    return LayerSizes(
        {
            **{"in_features": in_features, "out_features": out_features, "outlier_size": outlier_size},
            **{"group_size": columns // groups, "num_rows": rows, "line_length": length},
            **{"entries": entries, "residual_entries": residual_entries, "outlier_entries": outlier_entries},
            **{"GROUPS": groups, "BITS": bits, "RESIDUAL_BITS": residual_bits},
            **{"V": v, "VP": 1 << (v - 1).bit_length(), "VO": max(outlier_v, 1)},
        },
        dtype,
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(f"quantized layer: {message}")


def _together(tensors: dict[str, Any], first: str, second: str) -> None:
    _require((tensors[first] is None) == (tensors[second] is None), f"{first} and {second} come together or not at all")


def _shaped(tensors: dict[str, Any], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensors[name] is not None:
        found, dtype = tensors[name]
        allowed = " or ".join(map(str, dtypes))
        _require(dtype in dtypes, f"{name} is {dtype}; it must be {allowed}")
        _require(found == shape, f"{name} has shape {found}; this layer needs {shape}")


def _entries(tensors: dict[str, Any], name: str, groups: int, v: int, dtype: torch.dtype) -> int:
    """Entries of each of `groups` codebooks; 0 where there is none."""
    if tensors[name] is None:
        return 0
    shape, found = tensors[name]
    fits = len(shape) == 2 and shape[0] == groups and v > 0 and shape[1] % v == 0
    _require(fits, f"{name} has shape {shape}; it must be {groups} codebooks of vectors of {v}")
    _require(found == dtype, f"{name} is {found}; it must have the dtype of the main codebook, {dtype}")
    entries = int(shape[1]) // v
    _require(1 <= entries <= MAX_CENTROIDS, f"{name} has {entries} entries; allowed are 1 to {MAX_CENTROIDS}")
    return entries


def _bits(entries: int) -> int:
    bits = (entries - 1).bit_length()
    _require(entries == 1 << bits and bits > 0, f"{entries} entries; packed indices need a power of two, at least 2")
    return bits
