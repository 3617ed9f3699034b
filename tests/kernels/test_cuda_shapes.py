"""Layers that the published CUDA kernels refuse or get wrong: ours must not. As C++ on the CPU, and on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_layers import CARD, DEVICES, AsCpp, check_decode
from layer_checks import assert_close
from triton_layers import layer_of

from vptq.config import LayerConfig
from vptq.ops import cuda_launch, devices, triton_ops

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def kernels(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(cuda_launch, "cuda_compile", AsCpp(folder, CARD))
        monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
        monkeypatch.setattr(triton_ops.cuda_compile, "missing", lambda: "")


@pytest.mark.parametrize("columns", [8, 200, 256])
def test_at_most_256_input_columns(columns: int, device: str) -> None:
    config = LayerConfig(columns, 32, 8, 64, enable_norm=True, enable_perm=True)
    check_decode(config, torch.float16, device, (1, 2, 3))


@pytest.mark.parametrize("more", [1, 100])
def test_columns_just_beyond_a_multiple_of_1024(more: int, device: str) -> None:
    """There, threads leave before the sums are added up."""
    check_decode(LayerConfig(1024 + more, 16, 8, 64, enable_norm=True), torch.float16, device, (1, 2, 8))


def test_a_residual_codebook_larger_than_the_main_one(device: str) -> None:
    check_decode(LayerConfig(270, 32, 8, 16, num_residual_centroids=4096), torch.float16, device, (1, 4))


@pytest.mark.parametrize(("main", "residual"), [(64, 256), (256, 16)])
def test_groups_with_a_residual_codebook_of_another_size(main: int, residual: int, device: str) -> None:
    """The format has one size for all groups' residual codebooks, and another for their main ones."""
    config = LayerConfig(3 * 300, 32, 8, main, num_residual_centroids=residual, num_groups=3)
    check_decode(config, torch.float16, device, (1, 5))


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize("vector_len", [6, 10])
def test_outliers_beside_vectors_of_another_length_are_left_to_triton(
    vector_len: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of 4 beside vectors of 6 and 10, which 4 does not divide; no call may reach the CUDA kernel."""
    outliers: dict[str, Any] = {"outlier_size": 5, "outlier_vector_len": 4, "outlier_num_centroids": 32}
    config = LayerConfig(69, 45, vector_len, 64, **outliers)
    layer, stored = layer_of(config, torch.float16, device)
    monkeypatch.setattr(cuda_launch, "decode", lambda *_: pytest.fail("outlier columns have no CUDA kernel"))
    for tokens in (1, 3):
        x = torch.randn(tokens, 69).half()
        y = triton_ops.linear(x.to(layer.indices.device), *layer._stored(), layer.bias, *layer._sizes)
        assert_close(y.cpu(), x, config, stored)
