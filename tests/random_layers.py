"""Random layers of every kind the format has, for the tests of whatever reads, writes or runs them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from vptq.config import LayerConfig
from vptq.weight import QuantizedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def random_weight(config: LayerConfig, dtype: torch.dtype = torch.float16, seed: int = 0) -> QuantizedWeight:
    """A valid weight for `config` with every index equally likely, and floats that `dtype` holds exactly."""
    draw = torch.Generator().manual_seed(seed)

    def floats(*shape: int, around: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) / 4 + around).to(dtype)

    def below(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, generator=draw)

    rows = (config.num_groups, config.num_vectors, config.group_size)
    weight = QuantizedWeight(
        config,
        codebook=floats(config.num_groups, config.num_centroids, config.vector_len),
        indices=below(config.num_centroids, *rows),
    )
    if config.has_residual:
        weight.residual_codebook = floats(config.num_groups, config.num_residual_centroids, config.vector_len)
        weight.residual_indices = below(config.num_residual_centroids, *rows)
    if config.has_outliers:
        weight.outlier_codebook = floats(config.outlier_num_centroids, config.outlier_vector_len)
        weight.outlier_indices = below(config.outlier_num_centroids, config.num_outlier_vectors, config.outlier_size)
    if config.enable_perm:
        weight.perm = torch.randperm(config.in_features, generator=draw)
    if config.enable_norm:
        weight.weight_scale = floats(config.in_features, around=1.0)
        weight.weight_bias = floats(config.in_features)
    if config.bias:
        weight.bias = floats(config.out_features)
    return weight


@st.composite
def layer_configs(draw: st.DrawFn) -> LayerConfig:
    """Small layers over the whole format: packed or not, any widths, odd sizes, all options."""
    is_packed = draw(st.booleans())
    powers_of_two = st.integers(1, 10).map(lambda bits: 2**bits)
    centroids = powers_of_two if is_packed else st.integers(1, 700)
    outliers = draw(st.sampled_from((0, 0, 1, 3)))
    groups, group_size = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return LayerConfig(
        in_features=outliers + groups * group_size,
        out_features=draw(st.integers(1, 50)),
        vector_len=draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16))),
        num_centroids=draw(centroids),
        num_residual_centroids=draw(st.one_of(st.just(0), centroids)),
        num_groups=groups,
        outlier_size=outliers,
        outlier_vector_len=draw(st.sampled_from((2, 4, 8))) if outliers else 0,
        outlier_num_centroids=draw(st.integers(1, 300)) if outliers else 0,
        enable_norm=draw(st.booleans()),
        enable_perm=draw(st.booleans()),
        is_packed=is_packed,
        bias=draw(st.booleans()),
    )
