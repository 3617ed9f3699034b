"""`vptq::linear` called from several threads and processes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from random_layers import random_weight

from vptq.config import LayerConfig
from vptq.linear import VQuantLinear

LARGE = LayerConfig(611, 333, vector_len=8, num_centroids=4096)
RESIDUAL = LayerConfig(300, 90, vector_len=6, num_centroids=256, num_residual_centroids=16, num_groups=2)


def test_several_python_threads_at_once() -> None:
    layers = [VQuantLinear.from_weight(random_weight(c, torch.bfloat16), torch.bfloat16) for c in (LARGE, RESIDUAL)]
    inputs = [torch.randn(n, layer.in_features).bfloat16() for layer in layers for n in (1, 30)]
    work = [(layer, x) for layer in layers for x in inputs if x.shape[1] == layer.in_features] * 5
    alone = [layer(x) for layer, x in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda pair: pair[0](pair[1]), work))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def _sum_of_outputs(_: int) -> float:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    layer = VQuantLinear.from_weight(random_weight(LARGE, torch.float32), torch.float32)
    return float(layer(torch.ones(2, LARGE.in_features)).double().sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_other_processes(method: str) -> None:
    here = _sum_of_outputs(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_sum_of_outputs, range(2)) == [here, here]
