"""Small layers side by side, one thread each.

A small layer's steps take microseconds, and two threads that meet after each of them wait more than they work. The
layers of a block that have their Hessians do not depend on each other, torch releases Python's lock inside its
operators, and each layer draws from a generator of its own: so they are solved at the same time, one thread each, and
come out the same whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

from vptq.quantize.workers import Workers

SMALL_LAYER = 4_000_000
"""Weights up to which a layer counts as small. Larger ones keep all threads busy by themselves, and several of them at
once would need several times the memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_layers(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    sizes: Sequence[int],
    device: torch.device,
    workers: Workers | None = None,
) -> Iterator[Result]:
    """`function` of each item, in order; at the same time where workers do the work, or all are small and on the CPU.

    Args:
        function: thread-safe.
        items: the largest first makes the best use of the threads.
        sizes: how many weights each has.
        device: where `function` computes.
        workers: that `function` leaves the work to; None where it does it itself.

    Yields:
        The results in the order of the items, each as soon as it and those before it are there.
    """
    at_once = 1 if workers is None else len(workers)
    threads = min(at_once if at_once > 1 else torch.get_num_threads(), len(items))
    alone = at_once == 1 and (device.type != "cpu" or max(sizes) > SMALL_LAYER)
    if threads < 2 or alone:
        yield from map(function, items)
        return
    with nullcontext() if at_once > 1 else _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            if workers is not None and not all(future.done() for future in futures):
                workers.give_up()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
