"""The best few of many in Triton: lines of values, each with a name of its own, of which the lowest are kept.

Everything is chosen by (value, name): of equals the lower name wins, so that the same candidates leave the same line
in whatever order they come.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST = tl.constexpr(2**31 - 1)
"""A name behind all others: nobody's."""


@triton.jit
def worst_of(values, names):
    """Of each line of values [ROWS, n] and their distinct names the largest value, and of equals the last name."""
    worst = tl.max(values, 1)
    return worst, tl.max(tl.where(values == worst[:, None], names, -1), 1)


@triton.jit
def is_better(value, name, values, names):
    """Whether (value, name) [ROWS] comes before the last of a line of values and names [ROWS, n]."""
    worst, last = worst_of(values, names)
    return (value < worst) | ((value == worst) & (name < last))


@triton.jit
def replace_worst(values, names, value, name):
    """The same lines with (value, name) in place of the last, where it comes before that."""
    worst, last = worst_of(values, names)
    better = (value < worst) | ((value == worst) & (name < last))
    here = better[:, None] & (values == worst[:, None]) & (names == last[:, None])
    return tl.where(here, value[:, None], values), tl.where(here, name[:, None], names)


@triton.jit
def lowest(keys, names):
    """Of each line of keys [ROWS, n] the lowest, and of equals the first name."""
    value = tl.min(keys, 1)
    return value, tl.min(tl.where(keys == value[:, None], names, LAST), 1)
