"""`vptq::linear` in C++: what the grid of test_layers is too small for, and what only a kernel can get wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from column_problems import IMPLEMENTATIONS
from random_layers import random_weight
from thread_counts import with_each_thread_count
from torch import Tensor
from torch.nn import functional

from vptq import reference
from vptq.config import LayerConfig
from vptq.linear import VQuantLinear

INSTRUCTION_SETS = [name for name in IMPLEMENTATIONS if name != "torch"]
if not INSTRUCTION_SETS:
    pytest.skip("the C++ kernels were not built", allow_module_level=True)

# More columns than a chunk (256) and a tile (128) hold, more rows than either, neither a multiple of anything.
LARGE = LayerConfig(611, 333, vector_len=8, num_centroids=4096)
RICH = LayerConfig(
    *(611, 333, 6, 256, 64),
    **{"num_groups": 2, "outlier_size": 3, "outlier_vector_len": 4, "outlier_num_centroids": 16},
    **{"enable_norm": True, "enable_perm": True, "bias": True},
)
WIDE = LayerConfig(300, 90, vector_len=40, num_centroids=32, num_residual_centroids=16)
UNPACKED = LayerConfig(300, 90, vector_len=12, num_centroids=700, num_residual_centroids=9, is_packed=False)


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VPTQ_CPU_ISA", request.param)
    return str(request.param)


def layer_of(config: LayerConfig, dtype: torch.dtype, change: Callable[[Any], None] | None = None) -> VQuantLinear:
    weight = random_weight(config, dtype)
    if change is not None:
        change(weight)
    return VQuantLinear.from_weight(weight, dtype)


def exact(layer: VQuantLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output in float64, and the sum of the sizes of all products in it, intermediate ones included."""
    wide = {name: t.float() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    largest = {name: t.abs() if t.is_floating_point() else t for name, t in wide.items()}
    bias = torch.zeros(1) if layer.bias is None else layer.bias
    y = functional.linear(x.double(), reference.dequantize(layer.config, wide).double()) + bias.double()
    size = functional.linear(x.double().abs(), reference.dequantize(layer.config, largest).double())
    return y, size + bias.double().abs()


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 24, 25, 61])
@pytest.mark.parametrize("config", [LARGE, RICH, WIDE, UNPACKED], ids=["large", "rich", "wide", "unpacked"])
def test_many_chunks_and_tiles(config: LayerConfig, tokens: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = layer_of(config, dtype)
        x = torch.randn(tokens, config.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y, size = exact(layer, x)
        # Entries are exact in float32: what is left are the roundings of float32 sums and one of the result.
        allowed = torch.finfo(dtype).eps / 2 * y.abs() + 32 * 2.0**-24 * size
        assert ((layer(x).double() - y).abs() <= allowed).all()


def test_more_tokens_than_share_a_tile() -> None:
    layer = layer_of(LayerConfig(40, 70, vector_len=8, num_centroids=256), torch.float32)
    x = torch.randn(1030, 40)
    y, size = exact(layer, x)
    assert ((layer(x).double() - y).abs() <= 32 * 2.0**-24 * size).all()


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_outlying_weights(tokens: int) -> None:
    def spike(weight: Any) -> None:
        weight.codebook[:, ::97] *= 30

    layer = layer_of(LARGE, torch.bfloat16, spike)
    x = torch.randn(tokens, LARGE.in_features).bfloat16()
    x[:, ::50] *= 30
    y, size = exact(layer, x)
    assert ((layer(x).double() - y).abs() <= 2.0**-8 * y.abs() + 32 * 2.0**-24 * size).all()


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("bits", [(1, 0), (12, 0), (16, 0), (16, 16), (9, 8), (13, 12)])
def test_first_and_last_entry(bits: tuple[int, int], tokens: int) -> None:
    """All indices 0, and all bits set."""
    config = LayerConfig(70, 30, 4, 2 ** bits[0], num_residual_centroids=2 ** bits[1] if bits[1] else 0)
    for end in (0, -1):

        def to_the_end(weight: Any, end: int = end) -> None:
            weight.indices[:] = weight.codebook.shape[1] - 1 if end else 0
            if weight.residual_indices is not None:
                weight.residual_indices[:] = weight.residual_codebook.shape[1] - 1 if end else 0

        layer = layer_of(config, torch.float32, to_the_end)
        x = torch.randn(tokens, 70)
        y, size = exact(layer, x)
        assert ((layer(x).double() - y).abs() <= 32 * 2.0**-24 * size).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_every_16_bit_float_goes_through(dtype: torch.dtype, tokens: int, isa: str) -> None:
    """Times one, each comes out as it went in: subnormals (not AMX's), infinities and NaN too."""
    codebook = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    config = LayerConfig(1, 65536, vector_len=1, num_centroids=65536)
    weight = random_weight(config, dtype)
    weight.codebook, weight.indices = codebook.view(1, 65536, 1), torch.arange(65536).view(1, 65536, 1)
    y = VQuantLinear.from_weight(weight, dtype)(torch.ones(tokens, 1, dtype=dtype))
    if isa == "amx" and tokens > 2:
        codebook[codebook.float().abs() < torch.finfo(torch.float32).tiny] = 0
    for row in y:
        # 0 + -0 is 0; one NaN may become another.
        assert torch.equal(row[~codebook.isnan()], codebook[~codebook.isnan()])
        assert row[codebook.isnan()].isnan().all()


def test_rounding_is_to_nearest_even(isa: str) -> None:
    """Sums that no 16-bit float holds are rounded as PyTorch rounds them."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 5, 4096)
    for dtype in (torch.float16, torch.bfloat16):
        config = LayerConfig(2, 4096, vector_len=1, num_centroids=4096, num_residual_centroids=4096)
        weight = random_weight(config, dtype)
        high = x.to(dtype).clamp(-6e4, 6e4)
        low = (x.clamp(-6e4, 6e4) - high.float()).to(dtype)
        weight.codebook, weight.residual_codebook = high.view(1, -1, 1), low.view(1, -1, 1)
        weight.indices = weight.residual_indices = torch.arange(4096).view(1, -1, 1).expand(1, 4096, 2).contiguous()
        layer = VQuantLinear.from_weight(weight, dtype)
        y = layer(torch.tensor([[1.0, 0.0]], dtype=dtype))[0]
        assert torch.equal(y, (high.float() + low.float()).to(dtype))


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_threads_change_nothing(tokens: int) -> None:
    layer = layer_of(RICH, torch.bfloat16)
    x = torch.randn(tokens, RICH.in_features).bfloat16()
    one, *more = with_each_thread_count(lambda: layer(x))
    assert all(torch.equal(one, other) for other in more)


def test_indices_out_of_range_read_nothing_outside() -> None:
    """Loading refuses such a layer; if the tensor is changed afterwards, memory stays safe."""
    layer = layer_of(dataclasses.replace(UNPACKED, num_residual_centroids=0), torch.float32)
    layer.indices.data.fill_(-1)
    layer.centroids.weight.data[0, -12:] = 2.0
    y = layer(torch.ones(1, 300))
    assert torch.equal(y, torch.full((1, 90), 600.0))


WRONG: dict[str, tuple[str, Callable[[list[Any]], None]]] = {
    "x in float64": ("float16, bfloat16 or float32", lambda a: a.__setitem__(0, a[0].double())),
    "x in another dtype": ("dtype of the layer", lambda a: a.__setitem__(0, a[0].half())),
    "x too narrow": ("last dimension must be 611", lambda a: a.__setitem__(0, a[0][:, :-1])),
    "a codebook cut off": ("codebook must be 2 codebooks", lambda a: a.__setitem__(1, a[1][:, :-1])),
    "a codebook of 3/4 the size": ("power of two", lambda a: a.__setitem__(1, a[1][:, : 192 * 6].contiguous())),
    "index rows missing": ("indices has shape", lambda a: a.__setitem__(2, a[2][:, :-1].contiguous())),
    "indices in 64 bits": ("16-bit integers", lambda a: a.__setitem__(2, a[2].long())),
    "a residual codebook in half": ("dtype of the main codebook", lambda a: a.__setitem__(3, a[3].half())),
    "outlier indices without their codebook": ("come together", lambda a: a.__setitem__(5, None)),
    "too many outlier rows": ("outlier_indices has shape", lambda a: a.__setitem__(6, a[6].repeat(1, 2, 1))),
    "perm too short": ("perm has shape", lambda a: a.__setitem__(7, a[7][:-1])),
    "perm out of range": ("perm holds 65535", lambda a: a[7].data.fill_(-1)),
    "scale without bias": ("come together", lambda a: a.__setitem__(9, None)),
    "bias too long": ("bias must be 333 numbers", lambda a: a.__setitem__(10, a[10].repeat(2))),
    "no columns": ("a layer of 333 x 0", lambda a: a.__setitem__(11, 0)),
    "vectors of nothing": ("vector_len is 0", lambda a: a.__setitem__(13, 0)),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_contradict_each_other_never_reach_the_kernel(case: str) -> None:
    message, damage = WRONG[case]
    layer = layer_of(RICH, torch.float32)
    arguments = [torch.randn(2, 611), *layer._stored(), layer.bias, *layer._sizes]
    damage(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vptq.linear.default(*arguments)


def test_misaligned_storage() -> None:
    """Tensors that begin at odd addresses, as a memory-mapped file may have them."""
    layer = layer_of(RICH, torch.float32)

    def shifted(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        raw = torch.empty(tensor.nbytes + 4, dtype=torch.uint8)
        moved = raw[4:].view(tensor.dtype).view(tensor.shape)
        return moved.copy_(tensor)

    x = torch.randn(3, 611)
    arguments = [shifted(t) for t in layer._stored()]
    y = torch.ops.vptq.linear.default(shifted(x), *arguments, shifted(layer.bias), *layer._sizes)
    assert torch.equal(y, layer(x))
