"""One layer's entry of `quantization_config`: written in one dialect, read in every one ever published.

The format says "none" as -1, as null or by leaving the key out, pairs outlier and main values in lists, and carries
keys that only one branch of one version understood. All of that ends here: what comes out are plain keyword arguments
for `vptq.config.LayerConfig`, which alone decides whether the values make sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vptq.errors import ConfigError

if TYPE_CHECKING:
    from vptq.config import LayerConfig


def read_fields(entry: Mapping[str, Any], in_features: int | None, out_features: int | None) -> dict[str, Any]:
    """Translate the on-disk keys into `LayerConfig` fields.

    Args:
        entry: The JSON object; keys this package does not know are ignored.
        in_features: The linear layer's width if known. Must agree with the entry when both are there.
        out_features: Likewise.

    Raises:
        ConfigError: A key is missing, has the wrong type, or asks for what the format cannot hold.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"the entry is a {type(entry).__name__}; it must be an object")
    outlier_len, vector_len = _pair(entry, "vector_lens")
    outlier_centroids, centroids = _pair(entry, "num_centroids")
    outlier_residual, residual = _pair(entry, "num_res_centroids")
    # The format turns outliers on by their codebook; outlier_size alone does not.
    outliers = outlier_len > 1 and outlier_centroids > 0
    if outliers and outlier_residual > 0:
        raise ConfigError(f"num_res_centroids is [{outlier_residual}, {residual}]; outliers cannot have a residual")
    if entry.get("vector_quant_dim", "out") != "out":
        raise ConfigError(f'vector_quant_dim is {entry["vector_quant_dim"]!r}; only "out" exists in this format')
    norm = _flag(entry, "enable_norm")
    if norm and entry.get("norm_dim") not in (None, 0):
        raise ConfigError(f"norm_dim is {entry['norm_dim']!r}; only 0 (scales per input column) can be loaded")
    return {
        "in_features": _features(entry, "in_features", in_features),
        "out_features": _features(entry, "out_features", out_features),
        "vector_len": vector_len,
        "num_centroids": centroids,
        "num_residual_centroids": max(residual, 0),
        "num_groups": _integer(entry, "group_num", 1),
        "group_size": max(_integer(entry, "group_size", -1), 0),
        "outlier_size": _integer(entry, "outlier_size", 0) if outliers else 0,
        "outlier_vector_len": outlier_len if outliers else 0,
        "outlier_num_centroids": outlier_centroids if outliers else 0,
        "enable_norm": norm,
        "enable_perm": _flag(entry, "enable_perm"),
        "is_packed": _flag(entry, "is_indice_packed"),
        "indices_as_float": _flag(entry, "indices_as_float"),
        "bias": _flag(entry, "bias"),
    }


def write_fields(config: LayerConfig) -> dict[str, Any]:
    """The on-disk entry of a layer: exactly the keys that every published reader accepts."""
    return {
        "in_features": config.in_features,
        "out_features": config.out_features,
        "vector_lens": [config.outlier_vector_len or -1, config.vector_len],
        "num_centroids": [config.outlier_num_centroids or -1, config.num_centroids],
        "num_res_centroids": [-1, config.num_residual_centroids or -1],
        "group_num": config.num_groups,
        "group_size": config.group_size,
        "outlier_size": config.outlier_size,
        "indices_as_float": config.indices_as_float,
        "enable_norm": config.enable_norm,
        "enable_perm": config.enable_perm,
        "is_indice_packed": config.is_packed,
        "bias": config.bias,
    }


def _features(entry: Mapping[str, Any], key: str, known: int | None) -> int:
    stated = _integer(entry, key, -1)
    if stated < 0:
        if known is None:
            raise ConfigError(f"{key} is missing from the entry; add it, or give the linear layer's own")
        return known
    if known is not None and stated != known:
        raise ConfigError(f"{key} is {stated}, but the model's linear layer has {known}")
    return stated


def _integer(entry: Mapping[str, Any], key: str, default: int) -> int:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} is {value!r}; it must be an integer")
    return value


def _flag(entry: Mapping[str, Any], key: str) -> bool:
    value = entry.get(key)
    if value not in (None, True, False):  # also admits 0 and 1, which transformers does
        raise ConfigError(f"{key} is {value!r}; it must be true or false")
    return bool(value)


def _pair(entry: Mapping[str, Any], key: str) -> tuple[int, int]:
    value = entry.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(type(item) is not int for item in value):
        raise ConfigError(f"{key} is {value!r}; it must be a pair of integers [outliers, main], -1 for none")
    return value[0], value[1]
