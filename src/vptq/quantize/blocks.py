"""Quantizing the linear layers of one decoder block: which Hessians, in which order, and what is reported.

In "quantized" mode a layer is solved against what the quantized layers before it really feed it, inside the block too.
In "original" mode all Hessians of a block come from one pass of the original model, as published Hessian files do.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vptq.config import LayerConfig
from vptq.errors import CalibrationError, VPTQError
from vptq.quantize.activations import MAX_SEQUENTIAL_GROUPS, Activations, InputGroup
from vptq.quantize.hessian import HessianAccumulator, load_hessian
from vptq.quantize.job import Job
from vptq.quantize.report import LayerReport, ProgressCallback, ProgressEvent
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.solver import Solution, quantize_weight
from vptq.reference import dequantize

Solved = dict[str, tuple[LayerReport, Mapping[str, Tensor]]]
"""Module path -> its report and its tensors by on-disk name."""

BROKEN_LOSS_FACTOR = 4.0
"""No source is harder than a Gaussian, whose distortion at R bits is 2^-2R; k-means codebooks of every size in use stay
within 1.7 times of that (docs/algorithm.md). A proxy loss beyond 4 times means wrong data, not a small codebook."""


@dataclass
class BlockSolver:
    """Brings one decoder block after the other to its finished, stored state.

    Attributes:
        activations: hidden states at the input of the next block; None when Hessians come from files.
        warnings: lines for the report, collected while solving.
        layers_done: for the progress bar.
    """

    job: Job
    skeleton: Skeleton
    activations: Activations | None
    progress: ProgressCallback
    warnings: list[str] = field(default_factory=list)
    layers_done: int = 0

    def finish_block(self, index: int) -> list[LayerReport]:
        """Quantizes and stores block `index`, or takes it from an interrupted run; the activations advance past it."""
        job, workspace = self.job, self.job.workspace
        self.skeleton.load_block(index, job.compute_dtype)
        if not workspace.has_block(index):
            workspace.save_block(index, self._solve(index))
        else:
            self.layers_done += len(self.skeleton.linears(index))
            if self.activations is not None:
                if job.hessian_inputs == "quantized":
                    self._install(index)
                self.activations.run_block(index, advance=True)
        self.skeleton.unload_block(index)
        return workspace.block_reports(index)

    def _solve(self, index: int) -> Solved:
        solved: Solved = {}
        if self.activations is None:
            for name, linear in self.skeleton.linears(index).items():
                group = InputGroup((name,), linear.in_features)
                self._solve_group(index, group, self._stored_hessian(index, group), solved)
            return solved
        groups = self.activations.input_groups(index)
        original = self.job.hessian_inputs == "original"
        if original or len(groups) > MAX_SEQUENTIAL_GROUPS:
            moments = self.activations.hessians(index, groups, advance=original)
            for group, moment in zip(groups, moments, strict=True):
                self._solve_group(index, group, self._hessian(index, group, moment), solved)
        else:
            for group in groups:
                (moment,) = self.activations.hessians(index, [group])
                self._solve_group(index, group, self._hessian(index, group, moment), solved)
        if not original:
            self.activations.run_block(index, advance=True)
        return {name: solved[name] for name in map(partial(self._path, index), self.skeleton.linears(index))}

    def _path(self, index: int, name: str) -> str:
        return f"{self.skeleton.blocks_name}.{index}.{name}"

    def _solve_group(self, index: int, group: InputGroup, hessian: Tensor, solved: Solved) -> None:
        """Quantizes the layers of one input group; in "quantized" mode the block goes on with what will be stored."""
        job = self.job
        linears = self.skeleton.linears(index)
        for path in group.names:
            name = self._path(index, path)
            began = time.monotonic()
            linear = linears[path]
            generator = torch.Generator(job.device).manual_seed(zlib.crc32(f"{job.seed}/{name}".encode()))
            config = job.layer_config(linear)
            try:
                solution = quantize_weight(
                    linear.weight.data,
                    hessian,
                    config,
                    generator,
                    dtype=job.dtype,
                    bias=None if linear.bias is None else linear.bias.data,
                    solver=job.solver,
                )
            except VPTQError as error:
                raise type(error)(f"{name}: {error}") from error
            weight = solution.weight.absorb_perm() if job.absorb_perm else solution.weight
            tensors = {key: tensor.cpu() for key, tensor in weight.to_tensors(job.dtype).items()}
            solved[name] = (self._layer_report(name, weight.config, solution, time.monotonic() - began), tensors)
            if job.hessian_inputs == "quantized":
                linear.weight.data.copy_(dequantize(weight.config, tensors).to(linear.weight))

    def _install(self, index: int) -> None:
        """Puts the stored weights of a finished block into its linear layers."""
        modules = {self._path(index, name): linear for name, linear in self.skeleton.linears(index).items()}
        for name, weight in self.job.workspace.block_weights(index):
            linear = modules[name]
            linear.weight.data.copy_(dequantize(weight.config, weight.to_tensors(self.job.dtype)).to(linear.weight))

    def _hessian(self, index: int, group: InputGroup, moments: HessianAccumulator) -> Tensor:
        """A group's Hessian; the identity, with a warning, for layers that no text has reached (rare experts)."""
        if moments.tokens == 0:
            self.warnings.append(
                f"block {index}: no calibration token reached {', '.join(group.names)}; plain k-means there"
            )
            return torch.eye(group.features, device=self.job.device)
        try:
            return moments.hessian()
        except CalibrationError as error:
            raise CalibrationError(f"block {index}, inputs of {', '.join(group.names)}: {error}") from error

    def _stored_hessian(self, index: int, group: InputGroup) -> Tensor:
        assert self.job.hessian_dir is not None
        tails = [name.rpartition(".")[2] for name in group.names]
        return load_hessian(self.job.hessian_dir, index, tails, group.features).to(self.job.device)

    def _layer_report(self, name: str, config: LayerConfig, solution: Solution, seconds: float) -> LayerReport:
        report = LayerReport(
            name, config.to_entry(), config.bits_per_weight, solution.losses, round(seconds, 2), solution.damping
        )
        if solution.damping > self.job.solver.damping:
            self.warnings.append(f"{name}: damping raised to {solution.damping:g} to factor its Hessian")
        bits = (config.index_bits + config.residual_bits) / config.vector_len
        limit = BROKEN_LOSS_FACTOR * 2.0 ** (-2.0 * bits)
        if not report.loss <= limit:
            self.warnings.append(
                f"{name}: proxy loss {report.loss:.1%} is above {limit:.1%}; its Hessian or weight looks broken"
            )
        self.layers_done += 1
        line = f"{name}  loss {report.loss:.3%}  {config.bits_per_weight:.2f} bits"
        self.progress(ProgressEvent("quantizing layers", self.layers_done, self.skeleton.num_linears, line, name))
        return report
