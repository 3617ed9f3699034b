"""Gradients of codebooks, scales and biases, against autograd's own through the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from random_layers import layer_configs, random_weight

from vptq import reference
from vptq.config import LayerConfig
from vptq.linear import VQuantLinear


def layer_and_reference(config: LayerConfig, seed: int) -> tuple[VQuantLinear, dict[str, torch.Tensor]]:
    layer = VQuantLinear.from_weight(random_weight(config, torch.float32, seed), torch.float32)
    layer.train_floats()
    copies = {name: p.detach().clone().requires_grad_(p.is_floating_point()) for name, p in layer.named_parameters()}
    return layer, copies


@given(config=layer_configs())
@settings(deadline=None, max_examples=100)
def test_gradients_of_all_floats_and_the_input_are_those_of_the_reference(config: LayerConfig) -> None:
    layer, copies = layer_and_reference(config, seed=1)
    x = torch.randn(5, config.in_features, generator=torch.Generator().manual_seed(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    pull = torch.randn(5, config.out_features, generator=torch.Generator().manual_seed(3))
    layer(ours).backward(pull)
    reference.linear(config, copies, theirs).backward(pull)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in layer.named_parameters():
        if parameter.is_floating_point():
            torch.testing.assert_close(parameter.grad, copies[name].grad, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert parameter.grad is None


def test_a_layer_is_frozen_until_its_floats_are_asked_for() -> None:
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(16, 24, 4, 16, bias=True)), torch.float32)
    assert not layer(torch.randn(2, 16)).requires_grad
    layer.train_floats()
    assert layer(torch.randn(2, 16)).requires_grad
    layer.train_floats(False)
    assert not layer(torch.randn(2, 16)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_sixteen_bits_are_summed_in_float32(dtype: torch.dtype) -> None:
    config = LayerConfig(512, 512, 8, 2)  # 16,384 vectors a centroid: a sum in 16 bits stops growing long before
    layer = VQuantLinear.from_weight(random_weight(config, dtype), dtype)
    layer.train_floats()
    layer.dequantize_with_gradient().backward(torch.ones(512, 512, dtype=dtype))
    grad = layer.get_parameter("centroids.weight").grad
    assert grad is not None
    assert float(grad.float().sum()) == pytest.approx(512 * 512, rel=0.01)


def test_no_dense_weight_is_kept_for_the_backward_of_a_frozen_layer() -> None:
    """It would add up to the whole dense model when adapters are trained."""
    config = LayerConfig(64, 96, 8, 16, num_residual_centroids=16, enable_norm=True, enable_perm=True)
    layer = VQuantLinear.from_weight(random_weight(config), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 64, requires_grad=True))
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= {p.data_ptr() for p in layer.parameters()}


def test_the_same_gradient_gives_the_same_bytes() -> None:
    config = LayerConfig(96, 64, 8, 16, num_residual_centroids=16, enable_norm=True, enable_perm=True)
    grads = []
    for threads in (1, 2):
        layer, _ = layer_and_reference(config, seed=4)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            layer.dequantize_with_gradient().backward(torch.randn(64, 96, generator=torch.Generator().manual_seed(5)))
        finally:
            torch.set_num_threads(before)
        grads.append([p.grad for p in layer.parameters() if p.is_floating_point()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
