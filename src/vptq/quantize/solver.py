"""One weight and its Hessian in, one quantized weight out: the whole of VPTQ for a linear layer, and nothing else.

For W [out, in] and H = E[x x^T] the solver minimizes tr(E H E^T), E = W - W_hat (arXiv 2409.17066, eq. 2), in this
order:

    normalize -> permute -> k-means -> feedback pass -> (descent sweep -> refit)*          one codebook
                            k-means -> residual k-means -> joint refit -> the same          two codebooks

With weights u a row (`fisher.py`) it is tr(E H E^T diag(u)). Two things differ from the paper on purpose
(docs/algorithm.md). With W_hat = Q diag(s) + 1 b^T the error of Q is weighted by diag(s) H diag(s), where the published
code takes H. And assignment and codebooks are optimized in turn, where the paper stops after one pass.

The solver is pure: tensors, a config and a generator in, a dataclass out.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vptq.config import LayerConfig
from vptq.errors import CalibrationError, ConfigError
from vptq.ops import nearest
from vptq.quantize.feedback import descent_sweep, feedback_pass
from vptq.quantize.hessian import inverse_factor
from vptq.quantize.kmeans import weighted_kmeans
from vptq.quantize.refit import refit_codebooks, refit_normalization
from vptq.quantize.segments import Segment, decode_all, weigh_rows
from vptq.weight import QuantizedWeight


@dataclass(frozen=True)
class SolverConfig:
    """How hard the solver tries; the defaults are what docs/log.md measured to pay.

    Attributes:
        damping: share of the mean Hessian diagonal added before it is inverted.
        block_size: columns between two matrix products; changes speed only.
        search: residual centroids compared for one vector; `beam_for` turns it into a number of main candidates.
        kmeans_iterations: Lloyd steps at most, per codebook.
        residual_rounds: joint assignments and refits of main and residual codebook before the first pass.
        refit_rounds: descent sweeps with a refit after each, at most.
        refit_steps: conjugate-gradient steps of one refit at most.
        refit_tolerance: a refit ends when its residual's energy has fallen to this share; small codebooks get there
            soon.
        min_gain: a round that lowers the loss by less than this share of it is the last.
    """

    damping: float = 0.01
    block_size: int = 128
    search: int = 8192
    kmeans_iterations: int = 20
    residual_rounds: int = 3
    refit_rounds: int = 4
    refit_steps: int = 5
    refit_tolerance: float = 1e-2
    min_gain: float = 0.007

    def beam_for(self, segment: Segment) -> int:
        """Main candidates to try for each vector of `segment`: as many as `search` pays for, between 4 and 64."""
        return 1 if len(segment.stages) == 1 else min(64, max(4, self.search // len(segment.stages[1])))


@dataclass(frozen=True)
class Solution:
    """What `quantize_weight` found.

    Attributes:
        weight: the quantized weight, codebooks rounded to the storage dtype.
        losses: stage -> tr(E H E^T) / tr(W H W^T), in the order of the stages; the last is the loss of `weight`.
        damping: the damping the Cholesky factorization needed.
        energy: tr(W H W^T).
    """

    weight: QuantizedWeight
    losses: dict[str, float]
    damping: float
    energy: float


@dataclass
class _Problem:
    """The layer in quantized order: transposed and permuted, with the Hessian to match."""

    columns: Tensor
    hessian: Tensor
    perm: Tensor
    segments: list[Segment]
    solver: SolverConfig
    dtype: torch.dtype
    loss_unit: float
    losses: dict[str, float] = field(default_factory=dict)

    def record(self, stage: str, decoded: Tensor) -> float:
        error = self.columns - decoded
        weighed = weigh_rows(error, self.segments[0].rows)
        loss = float((weighed * (self.hessian @ error)).sum(dtype=torch.float64)) / self.loss_unit
        self.losses[stage] = loss
        return loss

    def diagonal(self, segment: Segment) -> Tensor:
        """What an error in the units of the codebook costs, a column: the diagonal of diag(s) H diag(s)."""
        return self.hessian.diagonal()[segment.start : segment.stop] * segment.scale.square()


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    config: LayerConfig,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    solver: SolverConfig | None = None,
) -> Solution:
    """Quantizes one linear layer.

    Args:
        weight: [out_features, in_features], any float dtype, on the device to work on.
        hessian: [in_features, in_features] float32, symmetric: E[x x^T] of the layer's inputs.
        config: vector length, codebook sizes, outliers, groups, normalization, permutation.
        generator: the only source of randomness, on the CPU.
        dtype: float dtype the result will be stored in; codebooks and scales are rounded to it.
        bias: [out_features], passed through.
        rows: [out_features] float32, positive: what the squared error of each output counts; None if all count alike.
        solver: how hard to try.

    Returns:
        The quantized weight, the loss after each stage, and the damping that was needed.

    Raises:
        ConfigError: shapes that contradict `config`, NaN or infinity in the weight, or rows that count nothing.
        CalibrationError: a Hessian that no damping makes positive definite.
    """
    expected = (config.out_features, config.in_features)
    if tuple(weight.shape) != expected:
        raise ConfigError(f"weight has shape {tuple(weight.shape)}, its config says {expected}")
    if tuple(hessian.shape) != (config.in_features, config.in_features):
        raise ConfigError(f"Hessian has shape {tuple(hessian.shape)}, the layer has {config.in_features} inputs")
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("weight holds NaN or infinity: the model file is damaged")
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError("Hessian holds NaN or infinity: the model overflows on the calibration text")
    if rows is not None and not (rows.shape == weight.shape[:1] and bool(((rows > 0) & rows.isfinite()).all())):
        raise ConfigError(f"rows must be {config.out_features} positive numbers: what each output counts")
    problem = _set_up(weight.float(), hessian.float(), config, solver or SolverConfig(), dtype, rows)
    _initialize_codebooks(problem, config, generator)
    factor, damping = inverse_factor(problem.hessian, problem.solver.damping)
    _optimize(problem, factor, affine=config.enable_norm)
    return Solution(_result(problem, config, bias), problem.losses, damping, problem.loss_unit)


def assign_rows(
    weight: Tensor, hessian: Tensor, found: QuantizedWeight, rows: Tensor | None, dtype: torch.dtype,
    solver: SolverConfig,
) -> Solution:  # fmt: skip
    """Quantizes rows [n, in_features] of a layer, float32, with what `quantize_weight` has `found` for others of it."""
    config = dataclasses.replace(found.config, out_features=len(weight))
    problem = _set_up(weight, hessian, config, solver, dtype, rows, found)
    columns, segments = problem.columns, problem.segments
    books = [] if found.outlier_codebook is None else [[found.outlier_codebook]]
    for number, book in enumerate(found.codebook):
        books.append([book] if found.residual_codebook is None else [book, found.residual_codebook[number]])
    for segment, stages in zip(segments, books, strict=True):
        segment.stages = stages
        segment.make_indices()
    factor, damping = inverse_factor(problem.hessian, solver.damping)
    decoded = feedback_pass(columns, factor, segments, solver.beam_for, solver.block_size)
    decoded = descent_sweep(columns, problem.hessian, segments, decoded, solver.beam_for, solver.block_size)
    problem.record("descent", decoded)
    return Solution(_result(problem, config, None), problem.losses, damping, problem.loss_unit)


def _set_up(
    weight: Tensor,
    hessian: Tensor,
    config: LayerConfig,
    solver: SolverConfig,
    dtype: torch.dtype,
    rows: Tensor | None,
    found: QuantizedWeight | None = None,
) -> _Problem:
    """Normalization, column order (those of `found`, if given) and segments. Dead inputs keep a tiny diagonal, so that
    every column has a cost."""
    loss_unit = float((weigh_rows(weight.T, rows) * (hessian @ weight.T)).sum(dtype=torch.float64))
    hessian = hessian.clone()
    hessian.diagonal().clamp_(min=1e-8 * float(hessian.diagonal().mean().clamp(min=1e-20)))
    shift = torch.zeros(config.in_features, device=weight.device)
    scale = torch.ones_like(shift)
    if found is not None and found.weight_scale is not None and found.weight_bias is not None:
        scale, shift = found.weight_scale, found.weight_bias
    elif config.enable_norm:
        shift = weight.mean(0).to(dtype).float()
        spread = (weight - shift).square().mean(0).sqrt()
        floor = max(1e-4 * float(spread.mean()), torch.finfo(dtype).tiny)  # constant columns: all is in the shift
        scale = torch.where(spread > floor, spread, torch.full_like(spread, max(float(spread.mean()), floor)))
        scale = scale.to(dtype).float()
    # A permutation may be free even where none is stored: absorb_perm undoes it when one codebook serves all columns.
    free = config.num_groups == 1 and not config.has_outliers
    perm = torch.arange(config.in_features, device=weight.device)
    if found is not None and found.perm is not None:
        perm = found.perm
    elif config.enable_perm or free:
        perm = torch.argsort(hessian.diagonal() * scale.square(), descending=True, stable=True)
    segments = []
    bounds = [0, config.outlier_size] if config.has_outliers else [0]
    bounds += [config.outlier_size + (g + 1) * config.group_size for g in range(config.num_groups)]
    for start, stop in itertools.pairwise(bounds):
        outliers = config.has_outliers and start == 0
        length = config.outlier_vector_len if outliers else config.vector_len
        at = perm[start:stop]
        segments.append(Segment(start, stop, length, config.out_features, scale[at], shift[at], rows=rows))
    columns = weight.T[perm].contiguous()
    return _Problem(columns, hessian[perm][:, perm], perm, segments, solver, dtype, max(loss_unit, 1e-30))


def _initialize_codebooks(problem: _Problem, config: LayerConfig, generator: torch.Generator) -> None:
    """Weighted k-means for each segment; with a residual codebook, alternating joint assignment and least squares."""
    solver = problem.solver
    for number, segment in enumerate(problem.segments):
        outliers = config.has_outliers and number == 0
        vectors = segment.normalized(problem.columns)
        weights = (problem.diagonal(segment)[:, None] * segment.vector_weights).reshape(-1)
        sizes = [config.outlier_num_centroids if outliers else config.num_centroids]
        if config.has_residual and not outliers:
            sizes.append(config.num_residual_centroids)
        rest = vectors
        for size in sizes:
            book = weighted_kmeans(rest, weights, size, generator, max_iterations=solver.kmeans_iterations)
            segment.stages.append(book)
            rest = rest - book[nearest(rest, book)[0][:, 0]]
        segment.assign(problem.columns, beam=1)
    problem.record("k-means", decode_all(problem.segments))
    if config.has_residual:
        for _ in range(solver.residual_rounds):
            for segment in problem.segments:
                segment.assign(problem.columns, solver.beam_for(segment))
            refit_codebooks(
                problem.columns,
                problem.hessian.diagonal(),
                problem.segments,
                solver.refit_steps,
                solver.refit_tolerance,
            )
        problem.record("joint codebooks", decode_all(problem.segments))


def _optimize(problem: _Problem, factor: Tensor, *, affine: bool) -> None:
    """The second-order pass, then descent and refit while the loss falls; codebooks end up rounded to the storage
    dtype."""
    columns, hessian, segments, solver = problem.columns, problem.hessian, problem.segments, problem.solver
    decoded = feedback_pass(columns, factor, segments, solver.beam_for, solver.block_size)
    previous = problem.record("feedback", decoded)
    for _ in range(solver.refit_rounds):
        if affine:
            refit_normalization(columns, hessian, segments, problem.dtype)
        decoded = refit_codebooks(columns, hessian, segments, solver.refit_steps, solver.refit_tolerance)
        decoded = descent_sweep(columns, hessian, segments, decoded, solver.beam_for, solver.block_size)
        loss = problem.record("descent", decoded)
        if loss > previous * (1.0 - solver.min_gain):
            break
        previous = loss
    problem.record("refit", refit_codebooks(columns, hessian, segments, solver.refit_steps, solver.refit_tolerance))
    for segment in segments:
        segment.stages = [book.to(problem.dtype).float() for book in segment.stages]
    problem.losses.pop("descent", None)
    decoded = descent_sweep(columns, hessian, segments, decode_all(segments), solver.beam_for, solver.block_size)
    problem.record("descent", decoded)


def _result(problem: _Problem, config: LayerConfig, bias: Tensor | None) -> QuantizedWeight:
    outliers = problem.segments[0] if config.has_outliers else None
    groups = problem.segments[1:] if config.has_outliers else problem.segments
    original = torch.argsort(problem.perm)
    scale = torch.cat([segment.scale for segment in problem.segments])[original]
    shift = torch.cat([segment.shift for segment in problem.segments])[original]
    residual = config.has_residual
    stored = QuantizedWeight(
        config=dataclasses.replace(config, enable_perm=True),
        codebook=torch.stack([group.stages[0] for group in groups]),
        indices=torch.stack([group.indices[0].T for group in groups]),
        residual_codebook=torch.stack([group.stages[1] for group in groups]) if residual else None,
        residual_indices=torch.stack([group.indices[1].T for group in groups]) if residual else None,
        outlier_codebook=outliers.stages[0] if outliers else None,
        outlier_indices=outliers.indices[0].T if outliers else None,
        perm=problem.perm,
        weight_scale=scale if config.enable_norm else None,
        weight_bias=shift if config.enable_norm else None,
        bias=bias,
    )
    if config.enable_perm:
        return stored
    free = stored.absorb_perm()
    return free if free.perm is None else dataclasses.replace(stored, config=config, perm=None)
