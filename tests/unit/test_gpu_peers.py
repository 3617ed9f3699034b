"""AQLM beside ours: what is not there, does not compile, fails or comes too late is told, and is not waited for."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_peers

SHAPES = ((32, 64), (64, 32))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if aqlm were there, its kernels compiled, and its layers on the CPU."""
    monkeypatch.setattr(gpu_peers, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu_peers, "IMPORT", "pass")
    monkeypatch.setattr(gpu_peers, "random_layer", lambda books, bits, shape, device: nn.Linear(*shape[::-1]).half())
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device, **rest: randn(*size, **rest))
    return monkeypatch


def measured(seconds: float = 60.0) -> gpu_peers.Peers:
    peers = gpu_peers.Peers()
    peers.measure(SHAPES, (1, 4), lambda work: 1000.0 * len(work()), time.monotonic() + seconds)
    return peers


def test_every_peer_shape_and_number_of_tokens_is_timed(installed: pytest.MonkeyPatch) -> None:
    peers = measured()
    assert peers.missing == ""
    found = [tuple(row.values()) for row in peers.rows]
    assert found[:3] == [("AQLM 2x8", "32x64", 1, 1e3), ("AQLM 2x8", "32x64", 4, 4e3), ("AQLM 1x16", "32x64", 1, 1e3)]
    assert len(found) == 2 * 2 * 2


@pytest.mark.skipif(find_spec("aqlm") is not None, reason="aqlm is installed")
def test_without_the_package_nothing_is_started() -> None:
    peers = measured()
    assert (peers.rows, peers.missing) == ([], "aqlm is not installed")


def test_kernels_that_cannot_be_compiled_are_told(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(gpu_peers, "IMPORT", "raise OSError('CUDA_HOME is not set')")
    peers = measured()
    assert (peers.rows, peers.missing) == ([], "aqlm's kernels cannot be compiled: OSError: CUDA_HOME is not set")


def test_a_compiler_is_not_waited_for_beyond_the_time(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(gpu_peers, "IMPORT", "import time; time.sleep(60)")
    began = time.monotonic()
    peers = measured(0.2)
    assert time.monotonic() - began < 10
    assert peers.missing == "the time was over before nvcc had compiled aqlm's kernels"


def test_what_was_timed_before_a_failure_is_kept(installed: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(64, 32).half()]
    installed.setattr(gpu_peers, "random_layer", lambda *arguments: layers.pop())
    peers = measured()
    assert len(peers.rows) == 2
    assert peers.missing == "AQLM 1x16: pop from empty list"


@pytest.mark.skipif(find_spec("aqlm") is None, reason="aqlm is not installed")
def test_the_packages_layer_takes_the_call() -> None:
    layer = gpu_peers.random_layer(1, 16, (32, 64), "cpu")
    assert layer(torch.randn(3, 64).half()).shape == (3, 32)
    assert layer.codes.shape == (32, 8, 1)
    assert layer.codes.min() < -1000 < 1000 < layer.codes.max(), "every entry is as likely"
