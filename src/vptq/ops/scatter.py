"""A scatter-add that gives the same bytes every time, on every device: every sum runs in one order."""

from __future__ import annotations

from torch import Tensor


def add_by_index(sums: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Adds each row of `values` [n, ...] to the row of `sums` [k, ...] that `index` [n] names, in place.

    A CPU adds one row after the other. A GPU would add all at once, by atomics, in an order that nobody knows; as an
    accumulating assignment it sorts the rows by their index first.
    """
    if sums.device.type == "cpu":
        return sums.index_add_(0, index, values)
    return sums.index_put_((index,), values, accumulate=True)
