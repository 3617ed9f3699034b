"""The Triton backend as an operator: which kernel serves a call, what is refused, and what compilers make of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_layers import DEVICES, layer_of, multiply

from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.ops import triton_paths
from vptq.ops.backends import TRITON_OPERATORS

EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)
RICH = LayerConfig(
    *(77, 45, 8, 64, 256),
    **{"num_groups": 2, "outlier_size": 19, "outlier_vector_len": 4, "outlier_num_centroids": 30},
    **{"enable_norm": True, "enable_perm": True, "bias": True},
)


@EVERY_DEVICE
def test_the_number_of_tokens_decides(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vptq.ops import triton_launch

    layer, _ = layer_of(LayerConfig(40, 24, 8, 16), torch.float16, device)
    used: list[str] = []
    for name in ("vector", "tiles", "dequantize"):
        launch = getattr(triton_launch, name)
        monkeypatch.setattr(triton_launch, name, lambda *a, n=name, f=launch: (used.append(n), f(*a))[1])
    for tokens in (1, 2, triton_paths.TILE_TOKENS, triton_paths.TILE_TOKENS + 1, 0):
        multiply(layer, torch.randn(tokens, 40).half())
    assert used == ["vector", "tiles", "tiles", "dequantize", "dequantize"]
    said = [(tokens, way) for tokens, way, _ in triton_paths.describe(8, torch.float16, None)]
    assert said == [("1", "vector"), ("2 to 64", "tiles"), ("65 or more", "dense")]


@pytest.mark.parametrize(
    ("vector_len", "dtype", "capability", "why"),
    [
        (8, torch.float16, None, ""),
        (64, torch.bfloat16, (8, 0), ""),
        (8, torch.float16, (7, 5), ""),
        (65, torch.float16, (9, 0), "vectors of 65"),
        (8, torch.bfloat16, (7, 5), "7.5 has no bfloat16; load with dtype=torch.float16"),
        (8, torch.float16, (7, 0), "compute capability 7.0"),
    ],
)
def test_what_the_kernels_take(vector_len: int, dtype: torch.dtype, capability: Any, why: str) -> None:
    said = triton_paths.obstacle(vector_len, dtype, capability)
    assert why in said
    assert bool(said) == bool(why)
    assert (triton_paths.describe(vector_len, dtype, capability)[0][1] == "torch") == bool(why)


@EVERY_DEVICE
def test_what_they_do_not_take_runs_in_pytorch_and_says_so_once(
    device: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vptq.ops import triton_launch, triton_ops

    config = LayerConfig(40, 130, 65, 16)
    layer, _ = layer_of(config, torch.float32, device)
    monkeypatch.setattr(triton_launch, "dequantize", lambda *_: pytest.fail("the kernel ran"))
    triton_ops._tell.cache_clear()
    x = torch.randn(3, 40)
    for _ in range(2):
        y = multiply(layer, x)
        dense = triton_ops.dequantize(*layer._stored(), *layer._sizes).cpu()
    assert torch.allclose(y, x @ dense.T, atol=1e-4)
    assert len(caplog.messages) == 1
    assert "vectors of 65 do not fit a tile" in caplog.messages[0]


WRONG: dict[str, tuple[str, Callable[[list[Any]], None]]] = {
    "x in another dtype": ("cast one of them", lambda a: a.__setitem__(0, a[0].half())),
    "x too narrow": ("must be in_features, 77", lambda a: a.__setitem__(0, a[0][:, :-1])),
    "a codebook cut off": ("codebook has shape", lambda a: a.__setitem__(1, a[1][:, :-1])),
    "a codebook of 3/4 the size": ("power of two", lambda a: a.__setitem__(1, a[1][:, : 48 * 8])),
    "index rows missing": ("indices has shape", lambda a: a.__setitem__(2, a[2][:, :-1])),
    "indices in 64 bits": ("indices is torch.int64", lambda a: a.__setitem__(2, a[2].long())),
    "a residual codebook in half": ("dtype of the main codebook", lambda a: a.__setitem__(3, a[3].half())),
    "outlier indices without their codebook": ("come together", lambda a: a.__setitem__(5, None)),
    "too many outlier rows": ("outlier_indices has shape", lambda a: a.__setitem__(6, a[6].repeat(1, 2, 1))),
    "perm too short": ("perm has shape", lambda a: a.__setitem__(7, a[7][:-1])),
    "scale without bias": ("come together", lambda a: a.__setitem__(9, None)),
    "bias too long": ("the bias has shape", lambda a: a.__setitem__(10, a[10].repeat(2))),
    "vectors of nothing": ("vectors of 0", lambda a: a.__setitem__(13, 0)),
}


@EVERY_DEVICE
@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_contradict_each_other_never_reach_a_kernel(case: str, device: str) -> None:
    from vptq.ops import triton_ops

    message, damage = WRONG[case]
    layer, _ = layer_of(RICH, torch.float32, device)
    arguments = [torch.randn(2, 77, device=device), *layer._stored(), layer.bias, *layer._sizes]
    damage(arguments)
    with pytest.raises(ConfigError, match=message):
        triton_ops.linear(*arguments)


OPERATOR = """
import json, sys, torch
import vptq.ops
early = "triton" in sys.modules
from random_layers import random_weight
from vptq.config import LayerConfig
from vptq.linear import VQuantLinear
layer = VQuantLinear.from_weight(random_weight(LayerConfig(40, 24, 8, 16, bias=True), torch.float32), torch.float32)
x = torch.randn(3, 40, requires_grad=True)
torch.library.opcheck(torch.ops.vptq.linear.default, (x.detach(), *layer._stored(), layer.bias, *layer._sizes))
torch.library.opcheck(torch.ops.vptq.dequantize.default, (*layer._stored(), *layer._sizes))
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
same = torch.equal(compiled(x.detach()), layer(x.detach()))
layer(x).sum().backward()
gradient = torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, -1), atol=1e-5)
layer.train_floats()
layer(x).sum().backward()
print(json.dumps({
    "early": early, "late": "triton" in sys.modules, "same": same, "gradient": gradient,
    "trained": bool(layer.centroids.weight.grad.any()),
    "reason": next(status.reason for status in vptq.ops.backends() if status.name == "triton"),
}))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for no GPU")
def test_the_operators_run_interpreted_where_asked_for() -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "VPTQ_BACKEND": "triton",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", OPERATOR], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    operators = ", ".join(f"vptq::{name}" for name in TRITON_OPERATORS)
    assert found.pop("reason") == f"Triton kernels on the CPU, interpreted (slowly) for {operators}"
    assert found == {"early": False, "late": True, "same": True, "gradient": True, "trained": True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_a_cuda_graph_and_a_compiled_layer_give_what_the_layer_gives(tokens: int) -> None:
    config = dataclasses.replace(RICH, in_features=19 + 2 * 256, group_size=256, out_features=96)
    layer, _ = layer_of(config, torch.float16, "cuda")
    x = torch.randn(tokens, config.in_features).half().cuda()
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_may_be_the_first_call_of_a_shape() -> None:
    """What a capture may not wait for, measuring tiles, it does without."""
    warm, _ = layer_of(LayerConfig(96, 64, 8, 256), torch.float16, "cuda")
    multiply(warm, torch.randn(1, 96).half())
    layer, _ = layer_of(LayerConfig(96, 72, 8, 256), torch.float16, "cuda")
    x = torch.randn(1, 96).half().cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.allclose(y, layer(x), atol=1e-2)
