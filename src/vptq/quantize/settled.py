"""Parts of a block that will not change any more, and what they put out, so that no later pass computes it again.

The quantized model runs up to every group of layers of a block, and then past it. Its attention is done with before
half of these runs: three of the five would compute it once more (docs/log.md has what that cost). Kept is what children
of the block return, on the device; what a single layer does is cheaper to do again than to hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class SettledParts:
    """Those of the block that some batches are in."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """For another block, or the same one with other weights."""
        self._layers: set[str] = set()
        self._parts: list[str] = []
        self._outputs: dict[tuple[str, int, int], Any] = {}

    def add(self, layers: Iterable[str], of: Iterable[str]) -> None:
        """More layers that stay as they are now.

        Args:
            layers: paths inside the block; all that run before them are settled already.
            of: all the block's layers.
        """
        self._layers |= set(layers)
        moving = {name.partition(".")[0] for name in of if name not in self._layers}
        self._parts = sorted({name.partition(".")[0] for name in self._layers if "." in name} - moving)

    @contextmanager
    def reused(self, block: nn.Module, position: int) -> Iterator[None]:
        """While `block` runs over batch `position`, settled parts that have run over it before do not run."""
        parts = [(name, block.get_submodule(name)) for name in self._parts]
        for name, part in parts:
            part.forward = partial(self._recall, part.forward, name, position, itertools.count())
        try:
            yield
        finally:
            for _, part in parts:
                del part.forward

    def _recall(
        self, forward: Callable[..., Any], name: str, position: int, calls: Iterator[int], *args: Any, **kwargs: Any
    ) -> Any:
        key = (name, position, next(calls))
        if key not in self._outputs:
            self._outputs[key] = forward(*args, **kwargs)
        return _copy(self._outputs[key])  # a block may go on to add to it in place


def _copy(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copy, output)) if type(output) is tuple else output
