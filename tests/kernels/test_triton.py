"""The Triton kernels against the reference over the whole format."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from layer_checks import assert_close
from random_layers import FLOATS
from triton_layers import DEVICES, check_layer, layer_of, multiply

from vptq.config import LayerConfig
from vptq.ops import triton_paths
from vptq.packing import to_carrier

pytestmark = pytest.mark.parametrize("device", DEVICES)

# No size is a multiple of a vector, a tile or a word.
FULL = LayerConfig(
    *(77, 45, 8, 64, 256),
    **{"num_groups": 2, "outlier_size": 19, "outlier_vector_len": 4, "outlier_num_centroids": 30},
    **{"enable_norm": True, "enable_perm": True, "bias": True},
)
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no permutation": {"enable_perm": False},
    "no normalization": {"enable_norm": False},
    "no residual": {"num_residual_centroids": 0},
    "no outliers": {"outlier_size": 0, "outlier_vector_len": 0, "outlier_num_centroids": 0, "in_features": 58},
    "no groups": {"num_groups": 1, "group_size": 58},
    "no bias": {"bias": False},
    "unpacked": {"is_packed": False, "num_centroids": 301, "num_residual_centroids": 7},
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, dtype: torch.dtype, device: str) -> None:
    check_layer(dataclasses.replace(FULL, **OPTIONS[option]), dtype, device)


@pytest.mark.parametrize(
    "bits", [(1, 0), (3, 0), (8, 0), (12, 0), (13, 0), (16, 0), (8, 8), (12, 8), (9, 16), (16, 16)]
)
def test_every_kind_of_index(bits: tuple[int, int], device: str) -> None:
    """Within words, across them, and as wide as one."""
    config = LayerConfig(70, 32, 4, 2 ** bits[0], num_residual_centroids=2 ** bits[1] if bits[1] else 0)
    check_layer(config, torch.float16, device)


def test_16_bit_carriers_are_unsigned(device: str) -> None:
    """Unpacked indices, outlier indices and a permutation beyond 32767."""
    from vptq.ops import triton_launch

    outliers: dict[str, Any] = {"outlier_size": 2, "outlier_vector_len": 2, "outlier_num_centroids": 65536}
    check_layer(LayerConfig(34, 16, 2, 65536, is_packed=False, **outliers), torch.float16, device)
    perm, x = torch.randperm(40000), torch.randn(1, 40000)
    found = triton_launch._reordered(x.to(device), to_carrier(perm).to(device))
    assert torch.equal(found.cpu(), x[:, perm])


@pytest.mark.parametrize("vector_len", [1, 2, 3, 4, 6, 10, 12, 16, 40])
def test_every_vector_length(vector_len: int, device: str) -> None:
    check_layer(dataclasses.replace(FULL, vector_len=vector_len), torch.bfloat16, device)


@pytest.mark.parametrize("tokens", range(34))
def test_every_small_number_of_tokens(tokens: int, device: str) -> None:
    config = LayerConfig(40, 24, 8, 16, bias=True)
    layer, stored = layer_of(config, torch.float16, device)
    x = torch.randn(tokens, 40).half()
    assert_close(multiply(layer, x), x, config, stored)


@pytest.mark.parametrize("way", [triton_paths.VECTOR, triton_paths.TILES, triton_paths.DENSE])
def test_all_ways_serve_any_number_of_tokens(way: str, device: str) -> None:
    layer, stored = layer_of(FULL, torch.float32, device)
    for tokens in (1, 5) if way == triton_paths.VECTOR else (1, 70):
        x = torch.randn(tokens, 77)
        assert_close(multiply(layer, x, way), x, FULL, stored)


@pytest.mark.parametrize("way", [triton_paths.VECTOR, triton_paths.TILES])
def test_columns_shared_by_programs_are_added_in_order(way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many splits and one give the same sum; calls give the same bytes."""
    from vptq.ops import triton_launch

    config = dataclasses.replace(FULL, in_features=19 + 2 * 250, group_size=250)
    layer, stored = layer_of(config, torch.float32, device)
    x = torch.randn(2, config.in_features)
    found, parts = [], []
    add = triton_launch._added
    monkeypatch.setattr(triton_launch, "_added", lambda part, *rest: (parts.append(part), add(part, *rest))[1])
    for programs in (1, 1000):
        for name in ("VECTOR_PROGRAMS", "MATRIX_PROGRAMS"):
            monkeypatch.setattr(triton_launch, name, programs)
        found.append(multiply(layer, x, way))
        assert_close(found[-1], x, config, stored)
        assert torch.equal(found[-1], multiply(layer, x, way))
    assert parts[-1] is not None
    assert len(parts[-1]) >= 4


def test_any_strides_and_leading_dimensions(device: str) -> None:
    layer, stored = layer_of(FULL, torch.float32, device)
    base = torch.randn(3, 2, 2 * 77)
    for x in (base[..., ::2].transpose(0, 1), base[0, 0, 77:], base[:, :1, :77], base[:0, :, :77]):
        assert_close(multiply(layer, x), x, FULL, stored)


def test_infinite_centroids_stay_in_their_rows(device: str) -> None:
    """What a tile reads beyond the layer must not be one of them: times zero, that is NaN."""
    config = LayerConfig(70, 12, 8, 16)
    layer, _ = layer_of(config, torch.float32, device)
    layer.indices.data.zero_()
    layer.centroids.weight.data[0, 3] = torch.inf
    x = torch.ones(5, 70)
    for way in (triton_paths.VECTOR, triton_paths.TILES):
        y = multiply(layer, x, way)
        rows = torch.tensor([row % 8 == 3 for row in range(12)])
        assert (y[:, rows] == torch.inf).all()
        assert y[:, ~rows].isfinite().all()


def test_indices_out_of_range_read_nothing_outside(device: str) -> None:
    """Loading refuses such a layer; if the tensors are changed afterwards, memory stays safe."""
    config = LayerConfig(70, 12, 12, 700, is_packed=False, enable_perm=True)
    layer, _ = layer_of(config, torch.float32, device)
    layer.indices.data.fill_(-1)
    layer.perm.data.fill_(99)
    layer.centroids.weight.data[0, -12:] = 2.0
    for tokens in (1, 2):
        assert torch.equal(multiply(layer, torch.ones(tokens, 70)), torch.full((tokens, 12), 140.0))
