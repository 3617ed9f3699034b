"""A layer's weight as it is stored, and how one is solved that is too large for the solver: a slab of rows at a time.

The solver keeps several float32 copies of a weight, which is too much for the output head of a large vocabulary.
Rows share the codebooks and the normalization of the columns and nothing else, and those are statistics, which a part
of the rows gives as well as all of them: they are solved for as many rows as fit, taken evenly from the whole weight.
Then slab by slab, every row takes its indices by the feedback pass and a descent sweep.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LayerConfig
from vptq.quantize.hessian import Moments
from vptq.quantize.memory import device_memory_bytes
from vptq.quantize.solver import Solution, SolverConfig, assign_rows, quantize_weight

LARGEST_AT_ONCE = 2**28
"""Weights up to which a layer is solved at once, memory allowing: every linear layer in the blocks of a 70B model
(8192 x 28672)."""

SLAB = 2**26
"""Weights in a slab: 268 MB a float32 copy."""

SOLVER_BYTES = 64
"""What the solver takes for each weight, counted with room to spare: some ten float32 copies, most of them k-means'."""


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight in the form it is stored in.

    Attributes:
        config: the layer as it is stored.
        tensors: by on-disk name, on the CPU.
        losses: as those of `Solution`.
        damping: likewise.
    """

    config: LayerConfig
    tensors: dict[str, Tensor]
    losses: dict[str, float]
    damping: float


def quantize_stored(
    weight: Tensor,
    moments: Moments,
    config: LayerConfig,
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    solver: SolverConfig,
    absorb_perm: bool = True,
) -> StoredWeight:
    """Quantizes a weight of any size.

    Args:
        weight: [out_features, in_features], any float dtype; a large one may be elsewhere than the Hessian.
        moments: of the layer's inputs, on the device to work on.
        config: as for `quantize_weight`.
        generator: likewise.
        dtype: likewise.
        bias: [out_features], passed through.
        rows: as for `quantize_weight`; anywhere.
        solver: how hard to try.
        absorb_perm: fold the permutation into the indices where the format allows it.

    Raises:
        VPTQError: as `quantize_weight`.
    """
    rows = None if rows is None else rows.to(moments.hessian.device)
    if weight.numel() > largest_at_once(moments.hessian.device):
        return _in_slabs(weight, moments, config, generator, dtype, bias, rows, solver, absorb_perm)
    weight = weight.to(moments.hessian.device)
    solution = quantize_weight(
        moments.target(weight), moments.hessian, config, generator, dtype=dtype, bias=bias, rows=rows, solver=solver
    )
    stored, tensors = _tensors(solution, dtype, absorb_perm)
    return StoredWeight(stored, tensors, solution.losses, solution.damping)


def largest_at_once(device: torch.device) -> int:
    """Weights up to which a layer is solved at once: fewer on a GPU of little memory (its size, not what is free of it,
    so that the same device gives the same bytes)."""
    size = device_memory_bytes(device)
    return min(LARGEST_AT_ONCE, size // SOLVER_BYTES) if size else LARGEST_AT_ONCE


def _in_slabs(
    weight: Tensor,
    moments: Moments,
    config: LayerConfig,
    generator: torch.Generator,
    dtype: torch.dtype,
    bias: Tensor | None,
    rows: Tensor | None,
    solver: SolverConfig,
    absorb_perm: bool,
) -> StoredWeight:
    hessian = moments.hessian
    vectors = math.lcm(config.vector_len, config.outlier_vector_len or 1)
    slab = min(SLAB, largest_at_once(hessian.device))
    height = max(1, slab // config.in_features // vectors) * vectors

    def target(part: Tensor) -> Tensor:
        return moments.target(part.to(hessian.device))

    chosen = _spread(config.out_features, height, vectors)
    sample = target(weight[chosen])
    counts = None if rows is None else rows[chosen.to(rows.device)]
    one = dataclasses.replace(config, out_features=len(sample), bias=False)
    found = quantize_weight(sample, hessian, one, generator, dtype=dtype, rows=counts, solver=solver)
    del sample
    parts, error, energy = [], 0.0, 0.0
    for start in range(0, config.out_features, height):
        at = slice(start, start + height)
        counts = None if rows is None else rows[at]
        solved = assign_rows(target(weight[at]), hessian, found.weight, counts, dtype, solver)
        stored, tensors = _tensors(solved, dtype, absorb_perm)
        parts.append(tensors)
        error += solved.losses["descent"] * solved.energy
        energy += solved.energy
    whole = parts[0] | {
        name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0] if name.endswith("indices")
    }
    if bias is not None:
        whole["bias"] = bias.to("cpu", dtype)
    stored = dataclasses.replace(stored, out_features=config.out_features, bias=bias is not None)
    return StoredWeight(stored, whole, {**found.losses, "descent": error / energy}, found.damping)


def _spread(out_features: int, rows: int, vectors: int) -> Tensor:
    """Numbers of about `rows` rows in runs of `vectors`, evenly spread over all full runs."""
    runs, wanted = out_features // vectors, rows // vectors
    first = torch.arange(min(runs, wanted)) * runs // min(runs, wanted) * vectors
    return (first[:, None] + torch.arange(vectors)).flatten()


def _tensors(solution: Solution, dtype: torch.dtype, absorb_perm: bool) -> tuple[LayerConfig, dict[str, Tensor]]:
    weight = solution.weight.absorb_perm() if absorb_perm else solution.weight
    return weight.config, {name: tensor.cpu() for name, tensor in weight.to_tensors(dtype).items()}
