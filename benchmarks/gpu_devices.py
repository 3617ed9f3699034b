"""GPUs by their published figures, and what a predicted time is made of; benchmarks/gpu_model.py predicts with them.

Times are in microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from vptq.ops.cuda_plan import Card

Shape = tuple[int, int]
"""Out x in."""

MEMORY_REACHED, TENSOR_REACHED = 0.9, 0.7
"""Shares of the published rates that a long stream, and the vendor's matrix multiplication, are taken to reach."""
LAUNCH, NEXT_LAUNCH = 3.0, 1.0
"""Of a CUDA graph of one kernel, start to end without work, and of each further kernel behind it. Assumed."""
READ = 0.5
"""A read that another waits for, from memory under load. Assumed."""
LINE, SECTOR, WARP = 128, 32, 32
ISSUED = 4
"""Instructions that a multiprocessor begins in a cycle, one for each of its schedulers."""


@dataclass(frozen=True)
class Device:
    """A GPU's figures.

    Attributes:
        name: Part of the name that PyTorch gives it.
        card: What `cuda_plan` wants to know.
        gigahertz: Clock, under load.
        memory: TB/s, published.
        cache: TB/s of the second-level cache, as others measured it.
        tensor: TFLOP/s of float16 with float32 sums, dense, published.
        near: Bytes of a table that the first-level cache keeps beside shared memory and streams. Assumed.
        lines: Different lines of the first-level cache that one load of a warp reaches in a cycle. Assumed.
    """

    name: str
    card: Card
    gigahertz: float
    memory: float
    cache: float
    tensor: float
    near: int
    lines: int = 1

    def alone(self, cycles: float) -> float:
        """Microseconds of cycles that every multiprocessor spends."""
        return cycles / self.gigahertz / 1e3

    def shared(self, cycles: float) -> float:
        """Microseconds of cycles that all multiprocessors share."""
        return self.alone(cycles) / self.card.multiprocessors

    def streamed(self, moved: float) -> float:
        """Microseconds for so many bytes from memory."""
        return moved / self.memory / 1e6

    def cached(self, moved: float) -> float:
        """Microseconds for so many bytes from the second-level cache."""
        return moved / self.cache / 1e6

    def multiplied(self, shape: Shape, tokens: int) -> float:
        """Microseconds of the tensor cores."""
        return 2 * tokens * shape[0] * shape[1] / self.tensor / 1e6


H200 = Device("H200", Card(132, 227 << 10), 1.755, 4.8, 6.25, 989, 160 << 10)
RTX_4090 = Device("RTX 4090", Card(128, 99 << 10), 2.52, 1.008, 5.0, 165, 77 << 10)
DEVICES = {"h200": H200, "rtx_4090": RTX_4090}


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a kernel, or of several one after the other.

    Attributes:
        busy: What each part of the GPU is busy for.
        fixed: What comes on top of the busiest: launches, and staging before the first lookup.
    """

    busy: dict[str, float]
    fixed: float

    @property
    def binds(self) -> str:
        """The busiest part."""
        return max(self.busy, key=lambda part: self.busy[part])

    @property
    def microseconds(self) -> float:
        """All of it."""
        return self.fixed + self.busy[self.binds]
