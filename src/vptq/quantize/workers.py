"""Processes that solve layers, so that several GPUs work at once: each has one of its own.

A layer is the unit, because layers that have their Hessians do not depend on each other: q, k and v, then gate and up;
with `--hessian-inputs original` all layers of a block. Only the solver runs in the workers. A thread of the main
process waits for each (`map_layers`), so that everything around a layer is the same with and without them; and since a
layer draws from a generator of its own, so is every byte.

Tensors go to a worker and come back through shared memory. On a CPU the workers share the threads there are.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vptq.config import LayerConfig
from vptq.errors import ConfigError, VPTQError
from vptq.quantize.hessian import Moments
from vptq.quantize.slabs import StoredWeight, quantize_stored

_own: list[torch.device] = []
"""In a worker: the device it solves on."""


class Workers:
    """Where layers are solved: in this process for one device, otherwise in one process for each.

    The processes are there inside the context, from the first layer on; outside, this process does the work.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._pool: ProcessPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.devices)

    def __enter__(self) -> Workers:
        if len(self) > 1:
            context = multiprocessing.get_context("spawn")  # a fork cannot use a GPU that its parent has used
            devices = context.SimpleQueue()
            for device in self.devices:
                devices.put(str(device))
            threads = max(1, torch.get_num_threads() // len(self))
            self._pool = ProcessPoolExecutor(len(self), context, _begin, (devices, threads))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def solve(self, weight: Tensor, moments: Moments, config: LayerConfig, seed: int, **options: Any) -> StoredWeight:
        """`quantize_stored` of one layer; may be called from as many threads at once as there are workers.

        Args:
            weight: as there.
            moments: as there; where the weight goes.
            config: as there.
            seed: of the layer's generator.
            **options: as there.

        Raises:
            VPTQError: as there, or a worker ended.
        """
        if self._pool is None:
            return quantize_stored(weight, moments, config, torch.Generator().manual_seed(seed), **options)
        shift = None if moments.shift is None else moments.shift.cpu()
        bias = options.pop("bias", None)
        sent = weight.cpu(), moments.hessian.cpu(), shift, config, seed, None if bias is None else bias.cpu()
        try:
            return self._pool.submit(_solve, *sent, options).result()
        except BrokenProcessPool:
            raise VPTQError(
                f"a worker of --workers {len(self)} ended by itself, most likely for want of memory, or in a "
                "container of /dev/shm (docker run --ipc=host); finished blocks are kept: go on with --resume"
            ) from None


def worker_devices(first: torch.device, workers: int) -> list[torch.device]:
    """A device for each worker, from `first` on.

    Raises:
        ConfigError: there are no workers, or fewer GPUs than workers.
    """
    if workers < 1:
        raise ConfigError(f"--workers is {workers}; at least 1 is needed")
    if workers == 1 or first.type == "cpu":
        return [first] * workers
    start = first.index or 0
    there = torch.get_device_module(first).device_count() - start
    if workers > there:
        raise ConfigError(
            f"--workers is {workers}, and each needs a GPU of its own: from {first.type}:{start} on there are {there}"
        )
    return [torch.device(first.type, start + number) for number in range(workers)]


def _begin(devices: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    _own.append(torch.device(devices.get()))


def _solve(
    weight: Tensor, hessian: Tensor, shift: Tensor | None, config: LayerConfig, seed: int, bias: Tensor | None,
    options: dict[str, Any],
) -> StoredWeight:  # fmt: skip
    (device,) = _own
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    moments = Moments(hessian.to(device), None if shift is None else shift.to(device))
    return quantize_stored(weight, moments, config, torch.Generator().manual_seed(seed), bias=bias, **options)
