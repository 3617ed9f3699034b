"""What torch asks of an operator: schema, fake, meta device, compile, export, and the rules for gradients."""

from __future__ import annotations

import pytest
import torch
from random_layers import random_weight

from vptq.config import LayerConfig
from vptq.linear import VQuantLinear

PLAIN = LayerConfig(48, 40, vector_len=8, num_centroids=16)
RICH = LayerConfig(
    51,
    42,
    vector_len=8,
    num_centroids=16,
    num_residual_centroids=64,
    num_groups=3,
    outlier_size=3,
    outlier_vector_len=4,
    outlier_num_centroids=10,
    enable_norm=True,
    enable_perm=True,
    bias=True,
)
UNPACKED = LayerConfig(
    48, 40, vector_len=6, num_centroids=100, num_residual_centroids=7, is_packed=False, enable_perm=True
)
CONFIGS = pytest.mark.parametrize("config", [PLAIN, RICH, UNPACKED], ids=["plain", "rich", "unpacked"])


def make_layer(config: LayerConfig) -> VQuantLinear:
    return VQuantLinear.from_weight(random_weight(config, torch.float32), torch.float32)


@CONFIGS
def test_opcheck(config: LayerConfig) -> None:
    layer = make_layer(config)
    stored, sizes = layer._stored(), layer._sizes
    torch.library.opcheck(torch.ops.vptq.dequantize.default, (*stored, *sizes))
    for x in (torch.randn(3, config.in_features), torch.randn(2, 4, config.in_features).transpose(0, 1)):
        torch.library.opcheck(torch.ops.vptq.linear.default, (x, *stored, layer.bias, *sizes))


@pytest.mark.parametrize("beam", [1, 3])
def test_opcheck_nearest(beam: int) -> None:
    torch.library.opcheck(torch.ops.vptq.nearest.default, (torch.randn(10, 4), torch.randn(6, 4), beam))


@pytest.mark.parametrize("residual", [None, torch.randn(3, 4)], ids=["one book", "two books"])
def test_opcheck_assign_columns(residual: torch.Tensor | None) -> None:
    base, coupling, main = torch.randn(4, 9), torch.randn(4, 4), torch.randn(6, 4)
    indices = torch.zeros(4, 3, dtype=torch.int64)
    more = None if residual is None else indices.clone()
    arguments = (base, coupling, base.clone(), torch.ones(4), torch.zeros(4), main, residual, indices, more, 2)
    torch.library.opcheck(torch.ops.vptq.assign_columns.default, arguments)


@CONFIGS
def test_compile_without_graph_breaks(config: LayerConfig) -> None:
    layer = make_layer(config)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 5, 6):
        x = torch.randn(tokens, config.in_features)
        with torch.inference_mode():
            assert torch.equal(compiled(x), layer(x))


def test_compile_with_gradients() -> None:
    layer = make_layer(RICH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, RICH.in_features, requires_grad=True)
    compiled(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(4, -1), atol=1e-5)


@CONFIGS
def test_export(config: LayerConfig) -> None:
    layer, x = make_layer(config), torch.randn(3, config.in_features)
    program = torch.export.export(layer, (x,))
    assert any(node.target is torch.ops.vptq.linear.default for node in program.graph.nodes)
    assert torch.equal(program.module()(x), layer(x))


@CONFIGS
def test_meta_device(config: LayerConfig) -> None:
    layer = VQuantLinear.from_config(config, dtype=torch.bfloat16, device="meta")
    y = layer(torch.empty(2, 7, config.in_features, dtype=torch.bfloat16, device="meta"))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, 7, config.out_features))
    assert layer.dequantize().shape == (config.out_features, config.in_features)


@CONFIGS
def test_gradients_reach_input_and_bias_only(config: LayerConfig) -> None:
    layer = make_layer(config)
    if layer.bias is not None:
        layer.bias.requires_grad_()
    x, twin = (torch.linspace(-1, 1, 2 * config.in_features).view(2, -1).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(twin, layer.dequantize(), bias).square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-5)
    assert bias is None or torch.allclose(layer.bias.grad, bias.grad)
    assert all(p.grad is None for name, p in layer.named_parameters() if name != "bias")
