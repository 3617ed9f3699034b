"""What long work tells those who wait for it. The library prints nothing; whoever calls it decides what is shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """One step of some work.

    Attributes:
        stage: What is being done, such as "sampling calibration text" or "quantizing"; a new name begins a new bar.
        done: Steps of the stage that are finished; may be any unit as long as `total` has the same.
        total: Steps of the whole stage; 0 when that is not known.
        message: A finished line worth keeping on the screen (one layer's loss, a warning), or empty.
        layer: Path of the layer or block being worked on, if any.
        loss: How far what was made in this step is from the original, where that is known: a layer's proxy loss, or KL.
    """

    stage: str
    done: int = 0
    total: int = 0
    message: str = ""
    layer: str | None = None
    loss: float | None = None


ProgressCallback = Callable[[ProgressEvent], None]


def ignore(event: ProgressEvent) -> None:
    """Shows nothing: for work that nobody watches."""


class StageTimes:
    """Passes events on, and notes for how long each stage was the one that was told about last.

    Attributes:
        seconds: By stage, in the order they began; "training block 7" counts as "training block".
    """

    def __init__(self, tell: ProgressCallback) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = tell
        self._stage = ""
        self._since = time.monotonic()

    def __call__(self, event: ProgressEvent) -> None:
        """Take note of one event and pass it on."""
        self.stop()
        self._stage = event.stage.rstrip("0123456789 ")
        self._tell(event)

    def stop(self) -> None:
        """The stage that is going on has ended."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = "", now
