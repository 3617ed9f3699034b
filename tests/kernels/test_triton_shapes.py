"""Layers that the published CUDA kernels refuse or get wrong: the Triton kernels must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_layers import DEVICES, check_layer

from vptq.config import LayerConfig

pytestmark = pytest.mark.parametrize("device", DEVICES)


def test_at_most_256_input_columns(device: str) -> None:
    for columns in (8, 200, 256):
        check_layer(LayerConfig(columns, 32, 8, 256, enable_norm=True, enable_perm=True), torch.float16, device)


def test_columns_just_beyond_a_multiple_of_1024(device: str) -> None:
    """There, threads leave before the sums are added up."""
    for more in (1, 100):
        check_layer(LayerConfig(1024 + more, 16, 8, 256, enable_norm=True), torch.float16, device, tokens=(1, 2))


def test_a_residual_codebook_larger_than_the_main_one(device: str) -> None:
    check_layer(LayerConfig(70, 32, 8, 16, num_residual_centroids=4096), torch.float16, device)


def test_groups_with_a_residual_codebook_of_another_size(device: str) -> None:
    for main, residual in ((64, 256), (256, 16)):
        config = LayerConfig(96, 32, 8, main, num_residual_centroids=residual, num_groups=3)
        check_layer(config, torch.float16, device)


@pytest.mark.parametrize("vector_len", [2, 6, 10])
def test_outliers_beside_vectors_of_another_length(vector_len: int, device: str) -> None:
    """Vectors of 4 beside vectors of 2, 6 and 10, and 45 rows that neither divides."""
    outliers: dict[str, Any] = {"outlier_size": 5, "outlier_vector_len": 4, "outlier_num_centroids": 32}
    check_layer(LayerConfig(69, 45, vector_len, 64, **outliers), torch.float16, device)


def test_no_normalization_and_unpacked_indices(device: str) -> None:
    check_layer(LayerConfig(70, 32, 8, 256, is_packed=False, enable_perm=True), torch.float16, device)


def test_float32(device: str) -> None:
    check_layer(LayerConfig(70, 32, 8, 256, enable_norm=True), torch.float32, device)


def test_index_widths_and_vector_lengths_without_a_kernel_of_their_own(device: str) -> None:
    check_layer(LayerConfig(70, 33, 3, 2**11, num_residual_centroids=2), torch.float16, device)
