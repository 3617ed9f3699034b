"""One linear layer of a model, in a decoder block or the output head: solved, in its stored form, and reported on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LayerConfig
from vptq.errors import VPTQError
from vptq.quantize.hessian import Moments
from vptq.quantize.job import Job
from vptq.quantize.report import LayerReport
from vptq.quantize.slabs import StoredWeight

BROKEN_LOSS_FACTOR = 4.0
"""No source is harder than a Gaussian, whose distortion at R bits is 2^-2R; k-means codebooks of every size in use stay
within 1.7 times of that (docs/algorithm.md). A proxy loss beyond 4 times means wrong data, not a small codebook."""


@dataclass(frozen=True)
class SolvedLayer:
    """A finished layer.

    Attributes:
        config: as it is stored.
        tensors: by on-disk name.
        report: what became of it.
        warnings: lines for the report of the run.
    """

    config: LayerConfig
    tensors: dict[str, Tensor]
    report: LayerReport
    warnings: list[str]


def solve_layer(
    job: Job, path: str, weight: Tensor, bias: Tensor | None, moments: Moments, config: LayerConfig,
    rows: Tensor | None = None,
) -> SolvedLayer:  # fmt: skip
    """Quantizes the layer at module path `path`; may be called from several threads at once.

    Raises:
        VPTQError: as `quantize_weight`, with the path.
    """
    began = time.monotonic()
    try:
        stored = job.workers.solve(
            weight, moments, config, job.seed_of(path), dtype=job.dtype, bias=bias, rows=rows, solver=job.solver,
            absorb_perm=job.absorb_perm,
        )  # fmt: skip
    except VPTQError as error:
        raise type(error)(f"{path}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise VPTQError(
            f"{path}: the GPU's memory is full; close what else uses it and go on with --resume, or give --device cpu"
        ) from error
    seconds = round(time.monotonic() - began, 2)
    report = LayerReport(
        path, stored.config.to_entry(), stored.config.bits_per_weight, stored.losses, seconds, stored.damping
    )
    return SolvedLayer(stored.config, stored.tensors, report, _warnings(job, path, stored, report))


def _warnings(job: Job, path: str, stored: StoredWeight, report: LayerReport) -> list[str]:
    warnings = []
    if stored.damping > job.solver.damping:
        warnings.append(f"{path}: damping raised to {stored.damping:g} to factor its Hessian")
    bits = (stored.config.index_bits + stored.config.residual_bits) / stored.config.vector_len
    limit = BROKEN_LOSS_FACTOR * 2.0 ** (-2.0 * bits)
    if not report.loss <= limit:
        warnings.append(
            f"{path}: proxy loss {report.loss:.1%} is above {limit:.1%}; its Hessian or weight looks broken"
        )
    return warnings
