"""VPTQ_CPU_CODEBOOK=int8: one token with codebooks rounded to bytes, against the same rounding done in float64."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

import pytest
import torch
from column_problems import HAS_KERNEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processor import processor_has
from random_layers import FLOATS, layer_configs, random_weight
from thread_counts import with_each_thread_count
from torch import Tensor

from vptq import reference
from vptq.config import LayerConfig
from vptq.linear import VQuantLinear

needs_instructions = pytest.mark.skipif(
    not HAS_KERNEL or not processor_has("avx512_vnni", "avx512vbmi"), reason="no AVX-512 VNNI and VBMI here"
)


@pytest.fixture(autouse=True)
def _int8(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_KERNEL:
        pytest.skip("the C++ kernels were not built")
    monkeypatch.setenv("VPTQ_CPU_CODEBOOK", "int8")


def rounded_to_bytes(layer: VQuantLinear) -> dict[str, Tensor]:
    """The layer's tensors in float32, its main and residual codebooks rounded as the kernel rounds them."""
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    for name in ("centroids.weight", "res_centroids.weight", "outlier_centroids.weight"):
        if name in tensors:
            length = layer.config.outlier_vector_len if name.startswith("outlier") else layer.config.vector_len
            entries = tensors[name].view(tensors[name].shape[0], -1, length)
            scale = entries.abs().amax(dim=1, keepdim=True) / 127
            kept = torch.where(scale > 0, (entries / scale.clamp(min=1e-30)).round() * scale, entries)
            tensors[name] = kept.view_as(tensors[name])
    return tensors


def check(config: LayerConfig, dtype: torch.dtype, seed: int, change: Any = None) -> None:
    weight = random_weight(config, dtype, seed)
    if change is not None:
        change(weight)
    layer = VQuantLinear.from_weight(weight, dtype)
    x = torch.randn(1, config.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tensors = rounded_to_bytes(layer)
    magnitudes = {name: t.abs() if t.is_floating_point() else t for name, t in tensors.items()}
    bias = tensors.get("bias", torch.zeros(1)).double()
    y = x.double() @ reference.dequantize(config, tensors).double().T + bias
    size = x.double().abs() @ reference.dequantize(config, magnitudes).double().T + bias.abs()
    # The input is rounded to 1/65278 of its range, the result to the layer's dtype; a tie between two bytes may go
    # either way: a step of 1/127 of the largest entry, in two weights of a row at most. A wrong entry is dozens.
    scaled = (x * layer.weight_scale if config.enable_norm else x).float().abs().max()
    largest = max(tensors[name].abs().max() for name in tensors if name.endswith("centroids.weight"))
    spread = float(scaled) * reference.dequantize(config, magnitudes).double().sum(1) / 65278 * 2
    ties = 2.02 * float(largest) / 127 * float(scaled)
    allowed = torch.finfo(dtype).eps * y.abs() + 2e-5 * size + spread + ties
    assert ((layer(x).double() - y).abs() <= allowed).all()


@needs_instructions
@given(layer_configs(), st.sampled_from(FLOATS), st.integers(0, 2**31))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer(config: LayerConfig, dtype: torch.dtype, seed: int) -> None:
    if config.vector_len <= 8:
        check(config, dtype, seed)


@needs_instructions
@pytest.mark.parametrize("vector_len", [1, 3, 4, 6, 8])
@pytest.mark.parametrize(("centroids", "residual"), [(256, 0), (256, 256), (64, 64), (128, 32), (4096, 0), (4096, 256)])
def test_common_codebooks(vector_len: int, centroids: int, residual: int) -> None:
    check(LayerConfig(611, 130, vector_len, centroids, num_residual_centroids=residual), torch.float32, seed=1)


@needs_instructions
def test_a_coordinate_that_is_always_zero() -> None:
    def clear(weight: Any) -> None:
        weight.codebook[..., 2] = 0

    check(LayerConfig(300, 64, 4, 256), torch.float32, 0, clear)


@needs_instructions
def test_inputs_that_are_not_finite_come_out_so() -> None:
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(100, 16, 4, 256), torch.float32), torch.float32)
    for poison in (float("nan"), float("inf"), float("-inf")):
        x = torch.ones(1, 100)
        x[0, 50] = poison
        assert not layer(x).isfinite().any()
    assert torch.equal(layer(torch.zeros(1, 100)), torch.zeros(1, 16))


@pytest.mark.parametrize(
    "config",
    [LayerConfig(64, 24, 12, 256), LayerConfig(64, 4096 * 4, 4, 8192), LayerConfig(64, 24, 4, 256)],
    ids=["long vectors", "a large codebook", "two tokens"],
)
def test_everything_else_stays_exact(config: LayerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = VQuantLinear.from_weight(random_weight(config, torch.float32), torch.float32)
    x = torch.randn(2 if config == LayerConfig(64, 24, 4, 256) else 1, 64)
    in_bytes = layer(x)
    monkeypatch.setenv("VPTQ_CPU_CODEBOOK", "exact")
    assert torch.equal(in_bytes, layer(x))


def test_other_instruction_sets_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(64, 24, 4, 256), torch.float32), torch.float32)
    monkeypatch.setenv("VPTQ_CPU_ISA", "generic")
    x = torch.randn(1, 64)
    in_bytes = layer(x)
    monkeypatch.delenv("VPTQ_CPU_CODEBOOK")
    assert torch.equal(in_bytes, layer(x))


@needs_instructions
def test_the_argument_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(64, 24, 4, 256), torch.float32), torch.float32)
    x = torch.randn(1, 64)
    in_bytes = layer(x)
    layer.codebook_form = "exact"
    exact = layer(x)
    assert not torch.equal(exact, in_bytes)
    monkeypatch.setenv("VPTQ_CPU_CODEBOOK", "exact")
    layer.codebook_form = "int8"
    assert torch.equal(layer(x), in_bytes)
    layer.codebook_form = ""
    assert torch.equal(layer(x), exact)


def test_a_form_that_is_neither() -> None:
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(64, 24, 4, 256)), torch.float16)
    layer.codebook_form = "int4"
    with pytest.raises(RuntimeError, match="codebook_form is 'int4'; allowed are exact and int8"):
        layer(torch.zeros(1, 64, dtype=torch.float16))


def test_a_word_that_is_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPTQ_CPU_CODEBOOK", "int4")
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(64, 24, 4, 256)), torch.float16)
    with pytest.raises(RuntimeError, match="VPTQ_CPU_CODEBOOK is 'int4'; allowed are exact and int8"):
        layer(torch.zeros(1, 64, dtype=torch.float16))
    assert import_module("vptq._C")


def test_threads_change_nothing() -> None:
    config = dataclasses.replace(LayerConfig(300, 200, 8, 256), num_residual_centroids=256)
    layer = VQuantLinear.from_weight(random_weight(config, torch.float32), torch.float32)
    x = torch.randn(1, 300)
    one, *more = with_each_thread_count(lambda: layer(x))
    assert all(torch.equal(one, other) for other in more)
