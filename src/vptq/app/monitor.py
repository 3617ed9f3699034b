"""What the machine and the model are doing, for the live charts."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import psutil
import torch

# How far back the charts go.
SECONDS = 120


@dataclass(frozen=True)
class Sample:
    """One moment.

    Attributes:
        when: Of `time.monotonic()`, in seconds.
        busy: Share of the GPU's time, or of all CPU cores' where there is none, in percent.
        memory: Of the GPU, or of this process, in GB.
        speed: Tokens generated per second since the sample before, whoever asked.
    """

    when: float
    busy: float
    memory: float
    speed: float


class Monitor:
    """Samples taken while somebody looks; all who look see the same ones.

    For one thread: psutil measures CPU use since the same thread asked before.
    """

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque()
        self.device = "GPU" if torch.cuda.is_available() else "CPU"
        self._process = psutil.Process()
        self._tokens = 0

    def sample(self, tokens: int) -> None:
        """Take a sample, unless there is one of this second.

        Args:
            tokens: Generated since the beginning.
        """
        now = time.monotonic()
        before = self.samples[-1].when if self.samples else now - 1
        if now - before < 0.9:
            return
        speed = (tokens - self._tokens) / (now - before)
        self._tokens = tokens
        self.samples.append(Sample(now, self._busy(), self._memory(), speed))
        while self.samples[0].when < now - SECONDS:
            self.samples.popleft()

    def _busy(self) -> float:
        if self.device == "CPU":
            return float(psutil.cpu_percent())
        try:
            return float(torch.cuda.utilization())
        except (ImportError, RuntimeError):  # it asks NVIDIA's own library, which is optional
            return float("nan")

    def _memory(self) -> float:
        if self.device == "CPU":
            return float(self._process.memory_info().rss) / 1e9
        free, total = torch.cuda.mem_get_info()
        return float(total - free) / 1e9
