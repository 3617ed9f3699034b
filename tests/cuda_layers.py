"""Layers through the CUDA decode kernel: on a GPU, or compiled as C++ and run on the CPU (tests/cuda/shim.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from layer_checks import assert_close
from torch import Tensor
from triton_layers import layer_of

from vptq.config import LayerConfig
from vptq.ops import cuda_compile, cuda_launch, triton_ops
from vptq.ops.cuda_plan import Card, Kind

KIB = 1 << 10
H100, A100, RTX_5090, RTX_4090, T4, V100 = (
    Card(count, shared * KIB) for count, shared in ((132, 227), (108, 163), (170, 99), (128, 99), (40, 64), (80, 96))
)
FORMS = {
    "v8-k256-256": (8, 8, 8),
    "v8-k256": (8, 8, 0),
    "v4-k256": (4, 8, 0),
    "v6-k4096": (6, 12, 0),
    "v8-k4096": (8, 12, 0),
    "v8-k4096-256": (8, 12, 8),
    "v8-k65536": (8, 16, 0),
    "v8-k65536-256": (8, 16, 8),
    "v12-k4096-4096": (12, 12, 12),
    "v16-k65536-65536": (16, 16, 16),
}
"""The forms that the project quantizes to: v, and the bits of both indices."""
CARD = Card(multiprocessors=3, shared_bytes=227 << 10)
"""For the CPU: few blocks, so that each goes through several rounds; shared memory as on an H100."""
GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.cuda is None or bool(cuda_compile.missing()),
    reason="no NVIDIA GPU, or no cuda-core",
)
DEVICES = (
    pytest.param("cpu", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the kernel as C++")),
    pytest.param("cuda", marks=[pytest.mark.gpu, GPU]),
)
"""For a parameter `device`: the kernel as C++, and on the GPU."""

_CUDA = Path(cuda_compile.__file__).parent / "cuda"
_SHIM = Path(__file__).parent / "cuda"
_FLAGS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{_CUDA}", f"-I{_SHIM}")


class AsCpp:
    """Stands in for `cuda_compile`: builds a kind's kernels with g++ and runs them on tensors of the CPU."""

    def __init__(self, folder: Path, card: Card) -> None:
        self.folder, self.on = folder, card
        self.grids: list[tuple[int, ...]] = []

    def card(self, device: torch.device) -> Card:
        return self.on

    def kernels(self, kind: Kind, tokens: int, device: torch.device) -> tuple[Callable[..., None], ...]:
        library = _built(kind, self.folder)
        return tuple(self._runner(getattr(library, f"run_{name}_{tokens}")) for name in ("decode", "add_parts"))

    def _runner(self, entry: Callable[..., None]) -> Callable[..., None]:
        def run(grid: tuple[int, ...], threads: int, shared: int, arguments: Sequence[Tensor | int | None]) -> None:
            pointers = [a if a is None else a.data_ptr() for a in arguments if not isinstance(a, int)]
            numbers = [a for a in arguments if isinstance(a, int)]
            self.grids.append(grid)
            entry(
                (ctypes.c_int * 2)(*grid, *(1,) * (2 - len(grid))),
                *(threads, shared),
                (ctypes.c_void_p * len(pointers))(*pointers),
                (ctypes.c_int * len(numbers))(*numbers),
            )

        return run


@cache
def _built(kind: Kind, folder: Path) -> ctypes.CDLL:
    parameters = kind.parameters(1).split(", ")
    before, after = ", ".join(parameters[:4]), ", ".join(parameters[5:])
    library = folder / f"{'-'.join(parameters)}.so"
    defined = (f"-DVPTQ_BEFORE={before}", f"-DVPTQ_AFTER={after}")
    subprocess.run(["g++", *_FLAGS, *defined, str(_SHIM / "kernels.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def decode(layer: torch.nn.Module, x: Tensor) -> Tensor | None:
    """The layer's output by the CUDA kernel, on the CPU; None where it leaves the layer to Triton."""
    x = x.to(layer.indices.device)
    y = cuda_launch.decode(x, [triton_ops._layer(layer._stored(), layer.bias, layer._sizes)])
    return y if y is None else y.view(len(x), -1).cpu()


def check_decode(config: LayerConfig, dtype: torch.dtype, device: str, tokens: Sequence[int]) -> None:
    """The outputs for each number of tokens are the reference's weight's, and calls give the same bytes."""
    layer, stored = layer_of(config, dtype, device)
    for count in tokens:
        x = torch.randn(count, config.in_features, generator=torch.Generator().manual_seed(count)).to(dtype)
        y = decode(layer, x)
        assert y is not None, "the kernel refused"
        assert_close(y, x, config, stored)
        assert torch.equal(y, decode(layer, x))
