"""Layers through the CUDA decode kernel: on a GPU, or compiled as C++ and run on the CPU (tests/cuda/shim.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vptq.linear import VQuantLinear
from vptq.ops import cuda_compile, cuda_launch, cuda_plan, triton_ops
from vptq.ops.cuda_plan import TOKENS, Card, Kind
from vptq.ops.triton_layer import layer_sizes, signature

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

    def __init__(self, folder: Path, card: Card = CARD) -> None:
        self.folder, self._card = folder, card
        self.plans: list[tuple[int, ...]] = []

    def card(self, device: torch.device) -> Card:
        return self._card

    def kernels(self, kind: Kind, tokens: int, device: torch.device) -> tuple[object, object]:
        library = _library(kind, self.folder)

        def runner(name: str) -> object:
            entry = getattr(library, f"run_{name}_{tokens}")

            def run(grid: tuple[int, ...], threads: int, shared: int, arguments: Sequence[Tensor | int | None]) -> None:
                pointers = [a if a is None else a.data_ptr() for a in arguments if not isinstance(a, int)]
                numbers = [a for a in arguments if isinstance(a, int)]
                self.plans.append((*grid, threads))
                entry(
                    (ctypes.c_int * 2)(*grid, *(1,) * (2 - len(grid))),
                    *(threads, shared),
                    (ctypes.c_void_p * len(pointers))(*pointers),
                    (ctypes.c_int * len(numbers))(*numbers),
                )

            return run

        return runner("decode"), runner("add_parts")


@cache
def _library(kind: Kind, folder: Path) -> ctypes.CDLL:
    before, tokens, after = kind.parameters(1).rpartition(", 1, ") if False else _around(kind)
    built = folder / f"{abs(hash(kind))}.so"
    command = ["g++", *_FLAGS, f"-DVPTQ_BEFORE={before}", f"-DVPTQ_AFTER={after}", str(_SHIM / "kernels.cpp")]
    subprocess.run([*command, "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def _around(kind: Kind) -> tuple[str, str, str]:
    """The kind's parameters before and after the tokens."""
    parts = kind.parameters(1).split(", ")
    return ", ".join(parts[:4]), parts[4], ", ".join(parts[5:])
