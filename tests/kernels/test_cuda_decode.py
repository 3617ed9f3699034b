"""The CUDA decode kernel against the reference: as C++ on the CPU, and on a GPU."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_layers import CARD, DEVICES, FORMS, AsCpp, check_decode, decode
from layer_checks import assert_close
from triton_layers import layer_of

from vptq import reference
from vptq.config import LayerConfig
from vptq.ops import cuda_launch, devices, triton_ops
from vptq.ops.cuda_plan import TOKENS, Card

pytestmark = pytest.mark.parametrize("device", DEVICES)
SMALL = Card(2, 40 << 10)


@pytest.fixture(autouse=True)
def kernels(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsCpp | None:
    if device != "cpu":
        return None
    stand_in = AsCpp(folder, CARD)
    monkeypatch.setattr(cuda_launch, "cuda_compile", stand_in)
    return stand_in


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_number_of_tokens(form: str, device: str) -> None:
    """No size is a multiple of a step, a vector, a row block or a word."""
    v, bits, residual_bits = FORMS[form]
    residual = 2**residual_bits if residual_bits else 0
    config = LayerConfig(
        611, 13 * v + 3, v, 2**bits, num_residual_centroids=residual, enable_norm=True, enable_perm=True
    )
    check_decode(config, torch.float16, device, range(1, TOKENS[-1] + 1))


ODD = LayerConfig(1051, 77, 8, 64, num_residual_centroids=8, enable_norm=True, enable_perm=True, bias=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "all of them": {},
    "no permutation": {"enable_perm": False},
    "no normalization": {"enable_norm": False},
    "no bias": {"bias": False},
    "rows that 16 bytes align": {"in_features": 1024},
    "one column": {"in_features": 1},
    "fewer columns than lanes": {"in_features": 200},
    "fewer rows than a vector": {"out_features": 5},
    "groups": {"in_features": 3 * 350, "num_groups": 3},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, dtype: torch.dtype, device: str) -> None:
    check_decode(dataclasses.replace(ODD, group_size=0, **OPTIONS[option]), dtype, device, (1, 3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(1, 0), (3, 0), (5, 6), (13, 0), (7, 12), (12, 11)])
def test_index_widths_that_no_word_holds_evenly(bits: tuple[int, int], device: str) -> None:
    config = LayerConfig(530, 24, 4, 2 ** bits[0], num_residual_centroids=2 ** bits[1] if bits[1] else 0)
    check_decode(config, torch.float16, device, (2,))


def test_slices_of_columns_give_the_same(device: str, kernels: AsCpp | None) -> None:
    """Where little shared memory is left, blocks take slices, and a second kernel adds their parts in order."""
    if kernels is None:
        pytest.skip("a GPU has the shared memory it has")
    config = dataclasses.replace(ODD, in_features=2 * 1500, num_groups=2, group_size=0)
    layer, stored = layer_of(config, torch.float16, device)
    x = torch.randn(8, config.in_features).half()
    kernels.on = SMALL
    y = decode(layer, x)
    assert y is not None
    assert len(kernels.grids) == 2
    assert kernels.grids[0][1] > 2, "more slices than groups"
    assert_close(y, x, config, stored)


def test_wide_layers_are_cut_though_they_would_fit(device: str, kernels: AsCpp | None) -> None:
    """So that a block gathers few inputs; column biases are summed by all slices together, each column once."""
    config = dataclasses.replace(ODD, in_features=8100, group_size=0)
    check_decode(config, torch.float16, device, (1, 3))
    if kernels is not None:
        assert [grid[1] for grid in kernels.grids if len(grid) == 2] == [3] * 4, "one for each multiprocessor"


def test_infinite_centroids_stay_in_their_rows(device: str) -> None:
    """What lies beyond the columns must not be looked up: times zero, infinity is NaN."""
    layer, _ = layer_of(LayerConfig(270, 24, 8, 64, num_residual_centroids=8), torch.float16, device)
    layer.indices.data.zero_()
    layer.centroids.weight.data[0, 3] = torch.inf
    for tokens in (1, 5):
        y = decode(layer, torch.ones(tokens, 270).half())
        assert y is not None
        rows = torch.arange(24) % 8 == 3
        assert (y[:, rows] == torch.inf).all()
        assert y[:, ~rows].isfinite().all()


def test_a_permutation_out_of_range_reads_nothing_outside(device: str) -> None:
    config = LayerConfig(270, 24, 8, 64, num_residual_centroids=8, enable_perm=True)
    layer, stored = layer_of(config, torch.float16, device)
    layer.perm.data.fill_(-1)  # 65535
    x = torch.zeros(1, 270).half()
    x[0, -1] = 1.0
    bare = {name: tensor for name, tensor in stored.items() if name != "perm"}
    every_column = reference.dequantize(dataclasses.replace(config, enable_perm=False), bare).float().sum(1)
    y = decode(layer, x)
    assert y is not None
    assert torch.allclose(y[0].float(), every_column, rtol=1e-2, atol=1e-2)


def test_an_unaligned_codebook_is_left_to_triton(device: str) -> None:
    layer, _ = layer_of(LayerConfig(270, 24, 8, 64), torch.float16, device)
    book = layer.centroids.weight
    moved = torch.empty(1, book.numel() + 1, dtype=book.dtype, device=book.device)[:, 1:]
    moved.copy_(book)
    layer.centroids.weight.data = moved
    assert decode(layer, torch.ones(1, 270).half()) is None


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_the_operator_uses_it_up_to_eight_tokens(
    device: str, kernels: AsCpp | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU as if it were a GPU of the newest kind; what the kernel declines, Triton does."""
    config = LayerConfig(270, 24, 8, 64, bias=True)
    layer, stored = layer_of(config, torch.float16, device)
    from vptq.ops import triton_launch

    took: list[str] = []
    if kernels is not None:
        monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
        monkeypatch.setattr(triton_ops.cuda_compile, "missing", lambda: "")
    for module, name in ((cuda_launch, "decode"), (triton_launch, "vector"), (triton_launch, "tiles")):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=launch: (took.append(n), f(*a))[1])

    def run(tokens: int) -> None:
        x = torch.randn(tokens, 270).half()
        y = triton_ops.linear(x.to(layer.indices.device), *layer._stored(), layer.bias, *layer._sizes)
        assert_close(y.cpu(), x, config, stored)

    for tokens in (1, 8, 9):
        run(tokens)
    assert took == ["decode", "decode", "tiles"]
    monkeypatch.setattr(cuda_launch, "decode", lambda *_: None)
    took.clear()
    for tokens in (1, 2):
        run(tokens)
    assert took == ["vector", "tiles"]
    if kernels is not None:
        took.clear()
        monkeypatch.setattr(devices, "capability", lambda device: (7, 0))
        run(1)
        assert took == [], "Triton is too new for this card, so PyTorch runs"


def test_a_cuda_graph_gives_what_the_layer_gives(device: str) -> None:
    """Captured with another number of tokens than the layer was called with before."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    config = dataclasses.replace(ODD, in_features=3 * 350, num_groups=3, group_size=0)
    layer, stored = layer_of(config, torch.float16, device)
    decode(layer, torch.zeros(1, config.in_features).half())
    x = torch.randn(5, config.in_features).half()
    on_device = x.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(on_device)
    y.zero_()
    graph.replay()
    assert_close(y.cpu(), x, config, stored)
    assert torch.equal(y, layer(on_device))
