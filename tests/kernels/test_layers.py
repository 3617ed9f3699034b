"""`vptq::dequantize` and `vptq::linear`, whichever kernels run them, against the reference over the whole format."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from column_problems import IMPLEMENTATIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_checks import assert_close
from random_layers import FLOATS, layer_configs, random_weight
from torch import Tensor

from vptq import linear as quantized_linear
from vptq import reference
from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.linear import VQuantLinear
from vptq.ops import dense

PLAIN = LayerConfig(96, 80, vector_len=8, num_centroids=256)
FULL = LayerConfig(
    67,
    45,
    vector_len=8,
    num_centroids=64,
    num_residual_centroids=256,
    num_groups=2,
    outlier_size=7,
    outlier_vector_len=4,
    outlier_num_centroids=32,
    enable_norm=True,
    enable_perm=True,
    bias=True,
)


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs everything here with the kernels of each instruction set, and with the PyTorch code behind them."""
    if request.param == "torch":
        monkeypatch.setattr(quantized_linear, "_linear", dense.linear)
    else:
        monkeypatch.setenv("VPTQ_CPU_ISA", request.param)


def make_layer(config: LayerConfig, dtype: torch.dtype, seed: int = 0) -> tuple[VQuantLinear, dict[str, Tensor]]:
    stored = random_weight(config, dtype, seed).to_tensors(dtype)
    return VQuantLinear.from_tensors(config, stored), stored


def check_layer(config: LayerConfig, dtype: torch.dtype, tokens: int, seed: int = 0) -> None:
    """The layer's dense weight is the reference's bit for bit, and its output that weight's."""
    layer, stored = make_layer(config, dtype, seed)
    assert torch.equal(layer.dequantize(), reference.dequantize(config, stored))
    x = torch.randn(tokens, config.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.inference_mode():
        assert_close(layer(x), x, config, stored)


@given(layer_configs(), st.sampled_from(FLOATS), st.integers(0, 33), st.integers(0, 2**31))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer(config: LayerConfig, dtype: torch.dtype, tokens: int, seed: int) -> None:
    check_layer(config, dtype, tokens, seed)


@pytest.mark.parametrize(("bits", "residual_bits"), list(itertools.product((1, 4, 8, 12, 13, 16), (0, 2, 8, 12, 16))))
def test_every_index_width(bits: int, residual_bits: int) -> None:
    config = dataclasses.replace(
        PLAIN, num_centroids=2**bits, num_residual_centroids=2**residual_bits if residual_bits else 0
    )
    check_layer(config, torch.float16, tokens=2)


@pytest.mark.parametrize("vector_len", [1, 2, 3, 4, 6, 8, 10, 12, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_vector_length_with_every_option(vector_len: int, dtype: torch.dtype) -> None:
    check_layer(dataclasses.replace(FULL, vector_len=vector_len), dtype, tokens=3)


@pytest.mark.parametrize("tokens", range(34))
def test_every_small_number_of_tokens(tokens: int) -> None:
    check_layer(FULL, torch.bfloat16, tokens)


def test_layers_of_several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense path gives the same weight in bands of one vector row as in one piece."""
    stored = random_weight(FULL).to_tensors(torch.float16)
    arguments = (FULL.in_features, FULL.out_features, FULL.vector_len, FULL.outlier_vector_len)
    tensors = VQuantLinear.from_tensors(FULL, stored)._stored()
    for band in (1, 1500, 1 << 30):
        monkeypatch.setitem(dense._BAND_WEIGHTS, "cpu", band)
        weight = dense.dequantize(*tensors, *arguments)  # type: ignore[arg-type]
        assert torch.equal(weight, reference.dequantize(FULL, stored))


@pytest.mark.parametrize("shape", [(67,), (0, 67), (1, 1, 67), (2, 0, 67), (2, 3, 4, 67)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer, stored = make_layer(FULL, torch.float32)
    x = torch.randn(shape)
    assert_close(layer(x), x, FULL, stored)


def test_any_strides() -> None:
    layer, stored = make_layer(FULL, torch.float32)
    base = torch.randn(5, 4, 2 * 67)
    for x in (base[..., ::2], base[..., 1::2].transpose(0, 1), base[0, 0, 67:].expand(3, 67), base[:, :1, :67]):
        assert not x.is_contiguous()
        assert_close(layer(x), x, FULL, stored)


def test_wrong_inputs_are_told_apart() -> None:
    layer = VQuantLinear.from_weight(random_weight(PLAIN), torch.float16)
    for device in ("cpu", "meta"):
        layer = layer.to(device)
        with pytest.raises(ConfigError, match=r"shape \(2, 95\); its last dimension must be in_features, 96"):
            layer(torch.zeros(2, 95, dtype=torch.float16, device=device))
        with pytest.raises(ConfigError, match=r"input is torch\.float32, the layer torch\.float16"):
            layer(torch.zeros(2, 96, device=device))
