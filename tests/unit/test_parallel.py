"""Layers solved side by side: the same results in the same order, and torch's threads as they were before."""

from __future__ import annotations

import threading

import pytest
import torch
from thread_counts import threads

from vptq.quantize.parallel import SMALL_LAYER, map_layers
from vptq.quantize.workers import Workers

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    with threads(2):
        yield


def test_small_layers_meet_in_the_middle_of_their_work(two_threads):
    """Both must be inside the function at once, or the barrier breaks."""
    barrier = threading.Barrier(2)

    def solve(item: int) -> int:
        barrier.wait(timeout=20)
        return item * item

    assert list(map_layers(solve, [3, 2], [10, 10], CPU)) == [9, 4]
    assert torch.get_num_threads() == 2


def test_a_large_layer_has_all_threads_to_itself(two_threads):
    seen = list(
        map_layers(lambda _: (threading.current_thread(), torch.get_num_threads()), [1, 2], [SMALL_LAYER + 1, 1], CPU)
    )
    assert seen == [(threading.main_thread(), 2)] * 2


def test_an_error_is_raised_and_threads_are_given_back(two_threads):
    def solve(item: int) -> int:
        raise ValueError(item)

    with pytest.raises(ValueError, match="7"):
        list(map_layers(solve, [7, 8], [1, 1], CPU))
    assert torch.get_num_threads() == 2


def test_layers_that_nobody_waits_for_are_given_up():
    """The first fails while the second is solved elsewhere, until it is told to end."""
    begun, told = threading.Event(), threading.Event()

    class Two(Workers):
        def __len__(self) -> int:
            return 2

        def give_up(self) -> None:
            told.set()

    def solve(item: int) -> bool:
        if item == 1:
            begun.wait(timeout=20)
            raise ValueError(item)
        begun.set()
        return told.wait(timeout=20)

    with pytest.raises(ValueError, match="1"):
        list(map_layers(solve, [1, 2], [10, 10], CPU, Two()))
    assert told.is_set()
