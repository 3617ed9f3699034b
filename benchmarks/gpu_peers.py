"""Kernels of others beside ours on a GPU: AQLM's, of the PyPI package `aqlm`, where it is installed and runs.

AQLM's vectors lie along the input and ours along the output; the work is the same: at vectors of 8, two codebooks of
256 (2x8, beside v8-k256-256) or one of 65536 (1x16, beside v8-k65536). The package compiles its kernels with nvcc when
they are first imported, which takes minutes: a process of its own does that while ours are measured. Where that fails,
or the time is over first, the result says so in a line instead of rows.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

PEERS = {"AQLM 2x8": (2, 8), "AQLM 1x16": (1, 16)}
"""Codebooks, and bits of an index into each."""
IMPORT = "import aqlm.inference_kernels.cuda_kernel"
Shape = tuple[int, int]


class Peers:
    """Compiles from the beginning, measures at the end.

    Attributes:
        rows: What was measured: peer, shape, tokens and microseconds.
        missing: Why not more; empty where nothing is missing.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.missing = "" if find_spec("aqlm") else "aqlm is not installed"
        self._compiler: subprocess.Popen[str] | None = None
        if not self.missing:
            command = [sys.executable, "-c", IMPORT]
            self._compiler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def measure(
        self,
        shapes: tuple[Shape, ...],
        tokens: tuple[int, ...],
        microseconds: Callable[[Callable[[], object]], float],
        until: float,
    ) -> None:
        """Times every peer on every shape and number of tokens, as long as `time.monotonic()` is below `until`."""
        if self._compiler is None or not self._compiled(until):
            return
        for shape in shapes:
            for peer, (books, bits) in PEERS.items():
                if time.monotonic() > until:
                    self.missing = f"the time was over before {peer} {shape[0]}x{shape[1]}"
                    return
                try:
                    layer = random_layer(books, bits, shape, "cuda")
                    for count in tokens:
                        x = torch.randn(count, shape[1], dtype=torch.float16, device="cuda")
                        found = {"peer": peer, "shape": f"{shape[0]}x{shape[1]}", "tokens": count}
                        self.rows.append(found | {"microseconds": microseconds(partial(layer, x))})
                except Exception as error:  # of a package that was not made for this PyTorch
                    self.missing = f"{peer}: {_first_line(str(error))}"
                    return

    def _compiled(self, until: float) -> bool:
        assert self._compiler is not None
        try:
            _, said = self._compiler.communicate(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._compiler.kill()
            self._compiler.communicate()
            self.missing = "the time was over before nvcc had compiled aqlm's kernels"
            return False
        if self._compiler.returncode:
            self.missing = f"aqlm's kernels cannot be compiled: {_first_line(said.strip().splitlines()[-1])}"
        return not self.missing


def random_layer(books: int, bits: int, shape: Shape, device: str) -> nn.Module:
    """AQLM's layer with vectors of 8, random codebooks and uniform codes."""
    from aqlm import QuantizedLinear

    layer: nn.Module = QuantizedLinear(
        shape[1], shape[0], 8, 1, books, bits, bias=False, device=device, dtype=torch.float16
    )
    layer.codebooks.data.normal_(std=0.02)
    layer.scales.data.fill_(1.0)
    limits = torch.iinfo(layer.codes.dtype)
    layer.codes.data.random_(limits.min, limits.max + 1)
    return layer


def _first_line(text: str) -> str:
    return (text.splitlines() or ["no message"])[0][:200]
