"""`VQuantLinear` as a module: what published loaders and torch expect of it."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from hypothesis import given
from random_layers import FLOATS, layer_configs, random_weight
from torch.nn import functional

from vptq.config import LayerConfig, tensor_specs
from vptq.errors import CheckpointError, ConfigError
from vptq.linear import VQuantLinear

CONFIG = LayerConfig(
    40, 24, vector_len=8, num_centroids=64, num_residual_centroids=16, enable_norm=True, enable_perm=True, bias=True
)
UNPACKED = LayerConfig(40, 24, vector_len=8, num_centroids=60, enable_perm=True, is_packed=False)


def test_constructor_is_the_published_one() -> None:
    """transformers passes two positionals and these keywords; the published loader adds dtype."""
    parameters = inspect.signature(VQuantLinear).parameters
    assert list(parameters) == [
        "in_features",
        "out_features",
        "vector_lens",
        "num_centroids",
        "num_res_centroids",
        "group_num",
        "group_size",
        "outlier_size",
        "indices_as_float",
        "enable_norm",
        "enable_perm",
        "is_indice_packed",
        "bias",
        "vector_quant_dim",
        "device",
        "dtype",
        "enable_proxy_error",
    ]
    layer = VQuantLinear(
        40,
        24,
        vector_lens=[-1, 8],
        num_centroids=[-1, 64],
        num_res_centroids=[-1, 16],
        group_num=1,
        group_size=40,
        outlier_size=0,
        indices_as_float=False,
        enable_norm=True,
        enable_perm=True,
        is_indice_packed=True,
        enable_proxy_error=False,
        bias=True,
    )
    assert layer.config == CONFIG
    with pytest.raises(ConfigError, match="vector_quant_dim"):
        VQuantLinear(40, 24, [-1, 8], [-1, 64], [-1, 16], 1, 40, 0, False, vector_quant_dim="in")


@given(layer_configs())
def test_every_stored_tensor_is_there_from_construction(config: LayerConfig) -> None:
    for dtype in FLOATS:
        layer = VQuantLinear.from_config(config, dtype=dtype)
        assert layer.dtype == dtype
        assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == {
            name: (spec.shape, spec.dtype) for name, spec in tensor_specs(config, dtype).items()
        }
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_ambient_device_and_dtype() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            layer = VQuantLinear.from_config(CONFIG)
    finally:
        torch.set_default_dtype(before)
    assert layer.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_absent_bias_is_none() -> None:
    assert VQuantLinear.from_config(UNPACKED).bias is None


@given(layer_configs())
def test_state_dict_round_trip(config: LayerConfig) -> None:
    layer = VQuantLinear.from_weight(random_weight(config), torch.float16)
    other = VQuantLinear.from_config(config, dtype=torch.float16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())


@pytest.mark.parametrize("carrier", [torch.uint16, torch.float16])
@pytest.mark.parametrize("config", [CONFIG, UNPACKED], ids=["packed", "unpacked"])
@pytest.mark.parametrize("assign", [True, False])
def test_legacy_carriers_load_by_bit_pattern(config: LayerConfig, carrier: torch.dtype, assign: bool) -> None:
    layer = VQuantLinear.from_weight(random_weight(config), torch.float16)
    legacy = {
        f"block.{name}": tensor.view(carrier) if tensor.dtype == torch.int16 else tensor
        for name, tensor in layer.state_dict().items()
    }
    model = torch.nn.ModuleDict({"block": VQuantLinear.from_config(config, dtype=torch.float16)})
    model.load_state_dict(legacy, assign=assign)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(model["block"].state_dict()[name], tensor)
        assert model["block"].state_dict()[name].dtype == tensor.dtype


def test_changing_the_float_dtype_leaves_indices_alone() -> None:
    layer = VQuantLinear.from_weight(random_weight(CONFIG), torch.float16)
    other = copy.deepcopy(layer).to(torch.float32)
    assert other.dtype == torch.float32
    for name in ("indices", "perm"):
        assert torch.equal(getattr(other, name), getattr(layer, name))
        assert getattr(other, name).dtype == getattr(layer, name).dtype
    x = torch.randn(2, 40)
    assert torch.allclose(other(x), layer(x.half()).float(), atol=0.05)


def test_tensors_that_contradict_the_config_are_refused() -> None:
    stored = random_weight(CONFIG).to_tensors(torch.float16)
    stored["perm"] = torch.zeros_like(stored["perm"])
    with pytest.raises(CheckpointError, match="perm is not a permutation"):
        VQuantLinear.from_tensors(CONFIG, stored)
    del stored["perm"]
    with pytest.raises(CheckpointError, match="perm is missing"):
        VQuantLinear.from_tensors(CONFIG, stored)


def test_a_dense_layer_computes_the_same() -> None:
    layer = VQuantLinear.from_weight(random_weight(CONFIG), torch.float32)
    dense, x = layer.to_dense(), torch.randn(5, 40)
    torch.testing.assert_close(dense(x), layer(x))
    assert not dense.weight.requires_grad
    assert dense.bias is layer.bias, "what trains the layer's bias sees it in the dense layer"
    cast = layer.to_dense(torch.bfloat16)
    assert (cast.weight.dtype, cast.bias.dtype, layer.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert VQuantLinear.from_config(UNPACKED).to_dense().bias is None


def test_printing_says_how_big_it_is() -> None:
    text = repr(VQuantLinear.from_config(CONFIG))
    assert "in_features=40, out_features=24, bias=True" in text
    assert f"codebook 64, residual 16, {CONFIG.bits_per_weight:.2f} bits per weight" in text


def test_autocast_gives_the_product_in_its_dtype_and_gradients_in_the_layers() -> None:
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(32, 24, 4, 16), torch.float32), torch.float32)
    layer.train_floats()
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, functional.linear(x, layer.dequantize().bfloat16()))
    y.sum().backward()
    grad = layer.get_parameter("centroids.weight").grad
    assert grad is not None
    assert grad.dtype == torch.float32
    with pytest.raises(ConfigError, match="bfloat16"):
        layer(x)
