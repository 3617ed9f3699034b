"""Where the solver's time goes, seen from outside: its functions are replaced by timed ones while a clock runs.

The solver stays pure and knows nothing of this. Time inside a nested stage counts for that stage alone, so the stages
add up to the whole. Beside the seconds stand the multiply-adds that a stage cannot do without when every centroid is
compared with every vector: 2 flops a coordinate of each distance, and those of its matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from vptq.quantize import kmeans, refit, segments, solver

Flops = Callable[..., float]

CODEBOOKS = "joint residual codebooks"
"""Without a residual codebook this stage is the first assignment alone."""


@dataclass
class Stage:
    """What one stage has cost so far.

    Attributes:
        cpu_seconds: of all threads; on a busy machine the figure to trust.
        search_seconds: wall-clock seconds spent finding nearest centroids.
        search_flops: of the distances that were compared.
        product_flops: of the matrix products and factorizations.
    """

    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    search_seconds: float = 0.0
    search_flops: float = 0.0
    product_flops: float = 0.0

    @property
    def flops(self) -> float:
        """All that is counted."""
        return self.search_flops + self.product_flops


class Clock:
    """Charges every moment between entering and leaving to the innermost open stage."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._open: list[Stage] = []
        self._mark = (0.0, 0.0)

    @contextmanager
    def stage(self, name: str, flops: float = 0.0) -> Iterator[Stage]:
        """Everything inside belongs to the stage `name`, but for what is inside a further stage."""
        current = self.stages.setdefault(name, Stage())
        self._charge()
        self._open.append(current)
        try:
            yield current
        finally:
            self._charge()
            self._open.pop()
            current.calls += 1
            current.product_flops += flops

    def is_open(self, name: str) -> bool:
        """Whether the stage `name` has been entered and not left."""
        return any(stage is self.stages.get(name) for stage in self._open)

    def search(self, flops: float, seconds: float) -> None:
        """Counts one search for nearest centroids."""
        if self._open:
            self._open[-1].search_seconds += seconds
            self._open[-1].search_flops += flops

    def product(self, flops: float) -> None:
        """Counts one matrix product."""
        if self._open:
            self._open[-1].product_flops += flops

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._open:
            self._open[-1].seconds += now[0] - self._mark[0]
            self._open[-1].cpu_seconds += now[1] - self._mark[1]
        self._mark = now


def _products(times: float) -> Flops:
    """Flops of `times` products of the Hessian [n, n] with columns [n, m]."""
    return lambda columns, *rest, **options: times * 2.0 * columns.shape[0] ** 2 * columns.shape[1]


def _distances(vectors: Tensor, codebook: Tensor, _beam: int = 1) -> float:
    return 2.0 * vectors.numel() * len(codebook)


def _column_distances(base: Tensor, *rest: Any) -> float:
    """As if every main centroid, and every residual centroid for each candidate of the beam, were compared."""
    main, residual, beam = rest[4], rest[5], rest[8]
    pairs = 0 if residual is None else min(beam, len(main)) * len(residual)
    return 2.0 * base.numel() * (len(main) + pairs)


def _factor(hessian: Tensor, _damping: float) -> float:
    return 4.0 / 3.0 * len(hessian) ** 3  # two Cholesky factorizations and the inverse between them


STAGES: tuple[tuple[str, str, Flops | None], ...] = (
    ("_set_up", "normalize and permute", lambda weight, *rest: 2.0 * weight.numel() * weight.shape[1]),
    ("_initialize_codebooks", CODEBOOKS, None),
    ("weighted_kmeans", "k-means", None),
    ("inverse_factor", "Cholesky", _factor),
    ("feedback_pass", "feedback pass", _products(0.5)),
    ("refit_normalization", "refit normalization", _products(2)),
    ("refit_codebooks", "refit codebooks", None),
    ("descent_sweep", "descent sweeps", _products(1.5)),
    ("_result", "collect the result", None),
)


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """The solver's functions report to `clock` until this is left."""

    def watch(function: Callable[..., Any], name: str, flops: Flops | None) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            inside = CODEBOOKS if name == "refit codebooks" and clock.is_open(CODEBOOKS) else name
            with clock.stage(inside, flops(*arguments, **options) if flops else 0.0):
                return function(*arguments, **options)

        return run

    def search(function: Callable[..., Any], flops: Flops) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            found = function(*arguments)
            clock.search(flops(*arguments), time.perf_counter() - began)
            return found

        return run

    def weigh(function: Callable[..., Any]) -> Callable[..., Any]:
        # A refit stops when it is done, so only its products themselves tell how many there were.
        def run(hessian: Tensor, columns: Tensor, rows: Tensor | None) -> Any:
            clock.product(2.0 * hessian.numel() * columns.shape[1] if hessian.dim() == 2 else 0.0)
            return function(hessian, columns, rows)

        return run

    with ExitStack() as patches:
        for function, name, flops in STAGES:
            patches.enter_context(patch.object(solver, function, watch(getattr(solver, function), name, flops)))
        record = watch(solver._Problem.record, "report the loss", lambda problem, *rest: _products(1)(problem.columns))
        patches.enter_context(patch.object(solver._Problem, "record", record))
        patches.enter_context(patch.object(refit, "_weigh", weigh(refit._weigh)))
        for module in (kmeans, solver):
            patches.enter_context(patch.object(module, "nearest", search(module.nearest, _distances)))
        columns = search(segments.assign_columns, _column_distances)
        patches.enter_context(patch.object(segments, "assign_columns", columns))
        yield
