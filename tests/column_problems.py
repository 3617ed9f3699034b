"""Blocks of weight columns and codebooks for the tests of `vptq::assign_columns`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from vptq import ops

HAS_KERNEL = any(status.name == "cpu" and status.active for status in ops.backends())


def runs(isa: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPTQ_CPU_ISA", isa)
        try:
            return HAS_KERNEL and bool(import_module("vptq._C").isa() == isa)
        except RuntimeError:
            return False


IMPLEMENTATIONS = ["torch", *(isa for isa in ("generic", "avx2", "avx512", "amx") if runs(isa))]
Assign = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Problem:
    base: Tensor
    coupling: Tensor | None
    present: Tensor | None
    scale: Tensor
    shift: Tensor
    main: Tensor
    residual: Tensor | None
    indices: Tensor
    residual_indices: Tensor | None
    row_weights: Tensor | None = None

    def run(self, assign: Assign, beam: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        stored = self.indices.clone(), None if self.residual_indices is None else self.residual_indices.clone()
        values, errors = assign(
            self.base, self.coupling, self.present, self.scale, self.shift, self.main, self.residual, *stored, beam,
            self.row_weights,
        )  # fmt: skip
        return values, errors, *stored

    def decode(self, indices: Tensor, residual_indices: Tensor | None) -> Tensor:
        vectors = self.main[indices]
        if self.residual is not None and residual_indices is not None:
            vectors = vectors + self.residual[residual_indices]
        rows = vectors.flatten(1)[:, : self.base.shape[1]]
        return rows * self.scale[:, None] + self.shift[:, None]


def make(
    n: int, rows: int, v: int, sizes: tuple[int, ...], *, coupled: bool, held: bool, seed: int, grid: bool = False,
    weighted: bool = False,
) -> Problem:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        if grid:  # few binary digits: every sum and product is exact, and ties are common
            return torch.randint(-3, 4, shape, generator=draw) / 2
        return torch.randn(*shape, generator=draw)

    def choices(count: int) -> Tensor:
        return torch.randint(0, count, (n, -(-rows // v)), generator=draw)

    problem = Problem(
        base=numbers(n, rows),
        coupling=numbers(n, n) / (1 if grid else 4) if coupled else None,
        present=None,
        scale=2.0 ** torch.randint(-1, 2, (n,), generator=draw) if grid else torch.rand(n, generator=draw) + 0.5,
        shift=numbers(n),
        main=numbers(sizes[0], v),
        residual=numbers(sizes[1], v) / 2 if len(sizes) > 1 else None,
        indices=choices(sizes[0]),
        residual_indices=choices(sizes[1]) if len(sizes) > 1 else None,
        row_weights=2.0 ** torch.randint(-3, 3, (rows,), generator=draw) if weighted else None,
    )
    return replace(problem, present=problem.decode(problem.indices, problem.residual_indices)) if held else problem
