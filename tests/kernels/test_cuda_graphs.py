"""Calls can be captured in a CUDA graph: nothing waits for the GPU, and only PyTorch allocates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from cuda_layers import CARD, AsCpp
from layer_checks import assert_close
from layer_groups import ALIKE, group_arguments, layers_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_layers import layer_of

from vptq.config import LayerConfig

pytest.importorskip("triton")
from vptq.ops import cuda_launch, devices, triton_kernels, triton_launch, triton_ops, triton_paths

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
PADDED = LayerConfig(611, 45, 6, 64, num_residual_centroids=8, enable_norm=True, enable_perm=True, bias=True)
GROUPED = LayerConfig(2 * 611, 45, 8, 64, num_groups=2, enable_norm=True, enable_perm=True, bias=True)
"""Its groups of columns write parts of sums to memory of the call's own, which a second kernel adds."""
HARMLESS = {"new_empty", "empty_like", "view", "_unsafe_view", "slice"}
"""What PyTorch may be asked for in a call: memory, and another look at a tensor."""


class Recorder(TorchDispatchMode):
    """Writes down what PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="captured for real where there is a GPU")
@pytest.mark.parametrize("cuda", [False, True], ids=["triton", "cuda"])
def test_a_call_asks_for_memory_and_nothing_else(cuda: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy to or from the host, no number read, whatever serves the call; Triton's kernels are left out."""
    kernels = MagicMock()
    kernels.Layer = triton_kernels.Layer
    monkeypatch.setattr(triton_launch, "kernels", kernels)
    if cuda:
        monkeypatch.setattr(cuda_launch, "cuda_compile", AsCpp(folder, CARD))
        monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
        monkeypatch.setattr(triton_ops.cuda_compile, "missing", lambda: "")
    (layer, _), (grouped, _) = (layer_of(config, torch.float16, "cpu") for config in (PADDED, GROUPED))
    pairs = layers_of(ALIKE, "cpu")
    together = group_arguments([other for other, _ in pairs])
    inputs = [torch.zeros(tokens, 611, dtype=torch.float16) for tokens in (1, 5, triton_paths.TILE_TOKENS)]
    with Recorder() as recorder:
        for x in inputs:
            triton_ops.linear(x, *layer._stored(), layer.bias, *layer._sizes)
            triton_ops.linear(x.new_empty(len(x), 2 * 611), *grouped._stored(), grouped.bias, *grouped._sizes)
        triton_ops.dequantize(*layer._stored(), *layer._sizes)
        triton_ops.linear_group(inputs[0], *together)
    assert "new_empty" in recorder.names
    assert recorder.names <= HARMLESS


def captured(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A graph that holds one call, made as PyTorch asks for: after a warm-up on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = work()

    def replay() -> Tensor:
        y.zero_()
        graph.replay()
        return y

    return replay


@pytest.mark.parametrize("tokens", [1, 5, 16, 64, 200])
@pytest.mark.parametrize("config", [ALIKE[0], PADDED, GROUPED], ids=["plain", "padded", "grouped"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_replay_sees_new_inputs(device: str, config: LayerConfig, tokens: int) -> None:
    layer, stored = layer_of(config, torch.float16, device)
    x = torch.zeros(tokens, config.in_features, dtype=torch.float16, device=device)
    replay = captured(lambda: layer(x))
    for seed in range(2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        assert_close(replay().cpu(), x.cpu(), config, stored)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_replay_of_layers_that_run_together(device: str, tokens: int) -> None:
    pairs = layers_of(ALIKE, device)
    together = group_arguments([layer for layer, _ in pairs])
    x = torch.zeros(tokens, 611, dtype=torch.float16, device=device)
    replay = captured(lambda: torch.ops.vptq.linear_group.default(x, *together))
    for seed in range(2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        outputs = replay().cpu().split([tokens * config.out_features for config in ALIKE])
        for y, config, (_, stored) in zip(outputs, ALIKE, pairs, strict=True):
            assert_close(y.view(tokens, -1), x.cpu(), config, stored)
