"""`vptq::assign_columns` and input that does not fit: refused by the operator, never seen by the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from column_problems import HAS_KERNEL, Assign, Problem, make

from vptq import ops
from vptq.errors import ConfigError

WRONG: dict[str, Callable[[Problem], Problem]] = {
    "base in 3 dimensions": lambda p: replace(p, base=p.base[None]),
    "coupling too small": lambda p: replace(p, coupling=torch.zeros(2, 2)),
    "present of another shape": lambda p: replace(p, present=torch.zeros(3, 7)),
    "indices too few": lambda p: replace(p, indices=p.indices[:, :-1].contiguous()),
    "indices of another type": lambda p: replace(p, indices=p.indices.int()),
    "residual without indices": lambda p: replace(p, residual_indices=None),
    "indices without residual": lambda p: replace(p, residual=None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(assign: Assign, wrong: str) -> None:
    problem = make(3, 16, 4, (8, 8), coupled=True, held=False, seed=9)
    with pytest.raises((ConfigError, RuntimeError, ValueError)):
        WRONG[wrong](problem).run(assign, 4)


ONLY_KERNEL: dict[str, Callable[[Problem], Problem]] = {
    "an index out of range": lambda p: replace(p, indices=p.indices + 8),
    "a negative residual index": lambda p: replace(p, residual_indices=torch.full_like(p.indices, -1)),
    "double precision": lambda p: replace(p, base=p.base.double()),
    "a residual of other length": lambda p: replace(p, residual=torch.zeros(8, 3)),
    "a scale too short": lambda p: replace(p, scale=p.scale[:-1]),
    "an empty codebook": lambda p: replace(p, main=torch.zeros(0, 4)),
}


@pytest.mark.skipif(not HAS_KERNEL, reason="built without the C++ kernels")
@pytest.mark.parametrize("wrong", ONLY_KERNEL)
def test_the_kernel_never_sees_hostile_input(wrong: str) -> None:
    problem = make(3, 16, 4, (8, 8), coupled=True, held=True, seed=10)
    with pytest.raises(RuntimeError, match="assign_columns: "):
        ONLY_KERNEL[wrong](problem).run(ops.assign_columns, 4)


@pytest.mark.skipif(not HAS_KERNEL, reason="built without the C++ kernels")
def test_indices_are_written_where_they_lie_or_not_at_all() -> None:
    problem = make(3, 16, 4, (8,), coupled=False, held=False, seed=11)
    with pytest.raises(RuntimeError, match="contiguous"):
        problem.run(
            lambda *given: ops.assign_columns(*given[:7], torch.zeros(3, 8, dtype=torch.int64)[:, ::2], *given[8:]), 1
        )
