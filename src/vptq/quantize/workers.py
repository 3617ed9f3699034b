"""Where layers are solved: in this process, or in several at once, so that every GPU has work.

A layer is the unit, because layers that have their Hessians do not depend on each other: q, k and v, then gate and up;
with `--hessian-inputs original` all layers of a block. Only the solver runs elsewhere. A thread of the main process
waits for each layer (`map_layers`), so that everything around it is the same wherever it is solved; and since a layer
draws from a generator of its own, so is every byte. (On a CPU the sums of a large layer are split by its threads: there
it takes as many of them, too.)

`Processes` are on this machine; those of a Ray cluster are in `cluster.py`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
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
"""In a worker process: the device it solves on."""


class Workers:
    """Solves layers in this process, one at a time; subclasses do it elsewhere while inside their context."""

    note = ""
    """What the user should be told of it, inside the context."""

    def __len__(self) -> int:
        """How many layers are solved at once."""
        return 1

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever was begun for this run has ended."""

    def give_up(self) -> None:
        """Ends what is being solved where this process cannot end it: nobody reads the results any more."""

    def solve(self, weight: Tensor, moments: Moments, config: LayerConfig, seed: int, **options: Any) -> StoredWeight:
        """`quantize_stored` of one layer; may be called from as many threads at once as this is long.

        Args:
            weight: as there.
            moments: as there; where the weight goes.
            config: as there.
            seed: of the layer's generator.
            **options: as there.

        Raises:
            VPTQError: as there, or what solves it was lost.
        """
        return quantize_stored(weight, moments, config, torch.Generator().manual_seed(seed), **options)


class Processes(Workers):
    """One process for each device, which begin with the first layer. Tensors go there and back through shared memory.

    On a CPU the processes share the threads there are.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._pool: ProcessPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.devices)

    def __enter__(self) -> Processes:
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
        """As in `Workers`."""
        if self._pool is None:
            return super().solve(weight, moments, config, seed, **options)
        try:
            return self._pool.submit(_solve, layer_to_send(weight, moments, config, seed, options)).result()
        except BrokenProcessPool:
            raise VPTQError(
                f"a worker of --workers {len(self)} ended by itself, most likely for want of memory, or in a "
                "container of /dev/shm (docker run --ipc=host); finished blocks are kept: go on with --resume"
            ) from None


def worker_devices(first: torch.device, workers: int) -> list[torch.device]:
    """A device for each worker, from `first` on.

    Raises:
        ConfigError: there are fewer GPUs than workers.
    """
    if workers == 1 or first.type == "cpu":
        return [first] * workers
    start = first.index or 0
    there = torch.get_device_module(first).device_count() - start
    if workers > there:
        raise ConfigError(
            f"--workers is {workers}, and each needs a GPU of its own: from {first.type}:{start} on there are {there}"
        )
    return [torch.device(first.type, start + number) for number in range(workers)]


def layer_to_send(
    weight: Tensor, moments: Moments, config: LayerConfig, seed: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `Workers.solve` was given, by name, with every tensor on the CPU: for `solve_sent`, in another process."""
    given = {**options, "weight": weight, "hessian": moments.hessian, "shift": moments.shift}
    sent = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}
    return {**sent, "config": config, "seed": seed}


def solve_sent(
    device: torch.device, *, weight: Tensor, hessian: Tensor, shift: Tensor | None, config: LayerConfig, seed: int,
    **options: Any,
) -> StoredWeight:  # fmt: skip
    """`quantize_stored` of a `layer_to_send`, on this device."""
    moments = Moments(hessian.to(device), None if shift is None else shift.to(device))
    return quantize_stored(weight, moments, config, torch.Generator().manual_seed(seed), **options)


def _begin(devices: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    _own.append(torch.device(devices.get()))


def _solve(layer: dict[str, Any]) -> StoredWeight:
    (device,) = _own
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    return solve_sent(device, **layer)
