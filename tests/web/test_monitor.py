"""The charts' figures are of this machine and this moment, and go back two minutes."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("psutil")

from vptq.app import monitor
from vptq.app.monitor import Monitor


def test_a_busy_second_shows() -> None:
    watch = Monitor()
    watch.sample(0)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    watch.sample(50)
    watch.sample(70)  # of the same second: not taken
    assert len(watch.samples) == 2
    latest = watch.samples[-1]
    assert latest.speed == pytest.approx(50, rel=0.5)
    assert latest.memory > 0.01
    assert watch.device == "GPU" or 0 < latest.busy <= 100


def test_samples_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = Monitor()
    for _ in range(monitor.SECONDS):
        now += 2
        watch.sample(0)
    assert watch.samples[-1].when - watch.samples[0].when == monitor.SECONDS
