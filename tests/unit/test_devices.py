"""What is asked of a device before a kernel is launched on it, with stand-ins for the devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from vptq.ops import devices


class TwoGPUs:
    """A device module, as `torch.cuda` is one, that knows which device is the current one."""

    def __init__(self) -> None:
        self.now = 0

    def current_device(self) -> int:
        return self.now

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.now = self.now, device.index
        yield
        self.now = before


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_of_the_tensor_is_the_current_one_at_a_launch(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = TwoGPUs()
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    with devices.current(torch.device("cuda", index)):
        assert module.now == index
    assert module.now == 0


def test_a_cpu_is_always_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _device: pytest.fail("there is nothing to ask"))
    with devices.current(torch.device("cpu")):
        assert devices.multiprocessors(torch.device("cpu")) == 1
        assert devices.capability(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"multi_processor_count": 132}, 132),
        ({"multi_processor_count": 0, "gpu_subslice_count": 56}, 56),
        ({"gpu_subslice_count": 56}, 56),
        ({}, 64),
    ],
)
def test_every_vendor_counts_its_processors_by_another_name(
    properties: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(get_device_properties=lambda _device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    assert devices.multiprocessors.__wrapped__(torch.device("xpu", 0)) == expected


def test_only_nvidias_have_a_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm calls its devices cuda as well."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 4))
    for version, expected in (("13.0", (9, 4)), (None, None)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert devices.capability.__wrapped__(gpu) == expected
    assert devices.capability.__wrapped__(torch.device("xpu", 0)) is None
