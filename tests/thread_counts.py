"""Torch with another number of threads for a while, for the tests of what must not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_each_thread_count(run: Callable[[], Result]) -> list[Result]:
    """What `run` returns with one thread, two and three: fewer than the cores, as many, or more."""
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run())
    return results
