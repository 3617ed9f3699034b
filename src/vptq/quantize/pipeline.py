"""The job `vptq quantize` does: original model in, folder in the published format out, one decoder block at a time.

All side effects live here and in the modules this one calls: files, hooks, progress, resume. The solver has none.
Order:

    check every setting -> calibration sequences -> for each block: Hessians, solve, store, run on -> write the folder

The hidden states advance through the stored (rounded) weights, so that a resumed run sees what the first one saw.
"""

from __future__ import annotations

import resource
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.errors import CalibrationError, ConfigError, VPTQError
from vptq.quantize.activations import MAX_SEQUENTIAL_GROUPS, Activations, InputGroup
from vptq.quantize.hessian import load_hessian
from vptq.quantize.output import unquantized, write_output
from vptq.quantize.report import LayerReport, ProgressCallback, ProgressEvent, Report
from vptq.quantize.setup import Job, prepare
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.solver import Solution, quantize_weight
from vptq.reference import dequantize
from vptq.spec import QuantSpec

BROKEN_LOSS_FACTOR = 4.0
"""No source is harder than a Gaussian, whose distortion at R bits is 2^-2R; k-means codebooks of every size in use stay
within 1.7 times of that (docs/algorithm.md). A proxy loss beyond 4 times means wrong data, not a small codebook."""


def quantize(
    model: str | Path | nn.Module,
    output_dir: str | Path,
    spec: str | QuantSpec = "v8-k65536-256",
    *,
    calibration: str | Path = "self",
    sequences: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    hessian_dir: str | Path | None = None,
    hessian_inputs: str = "quantized",
    norm: bool | None = None,
    perm: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    absorb_perm: bool = True,
    progress: ProgressCallback | None = None,
) -> Report:
    """Quantizes a causal language model and writes it in the VPTQ checkpoint format.

    Args:
        model: hub id, local folder, GGUF file, or a transformers model in memory.
        output_dir: must not exist, unless `overwrite` or `resume`.
        spec: such as "v8-k65536-256".
        calibration: "self" (the model writes its own text), a text file, "wikitext2", "c4" or a hub data set.
        sequences: calibration sequences.
        seqlen: tokens a sequence.
        seed: of everything random; same seed and machine, same bytes.
        device: "auto" (CUDA when there is one), "cpu", "cuda:1", ...
        dtype: float16 or bfloat16 of what is stored; None takes the model's own, bfloat16 if that is wider.
        hessian_dir: read Hessians from QuIP#/VPTQ files instead of calibrating.
        hessian_inputs: "quantized" or "original": whose activations the Hessians are made of.
        norm: column normalization; None is what the spec says.
        perm: column permutation; None is what the spec says.
        overwrite: replace an output folder that exists.
        resume: go on with an interrupted run.
        absorb_perm: fold the permutation into the indices where the format allows it.
        progress: told about every step.

    Returns:
        The report that is also stored as report.json.

    Raises:
        VPTQError: one of its kinds, with one line that says what to do. Nothing is written then, except that a run
        that fails
            after finishing a block keeps its work folder for `resume`.
    """
    started = time.monotonic()
    job = prepare(
        model, Path(output_dir), spec, calibration=str(calibration), sequences=sequences, seqlen=seqlen, seed=seed,
        device=device, dtype=dtype, hessian_dir=None if hessian_dir is None else Path(hessian_dir),
        hessian_inputs=hessian_inputs, norm=norm, perm=perm, overwrite=overwrite, resume=resume,
        absorb_perm=absorb_perm,
    )  # fmt: skip
    job.enter_workspace()
    try:
        return _Run(job, progress or (lambda event: None)).execute(started)
    except (CalibrationError, ConfigError):
        job.leave_workspace()  # the same input would fail again
        raise
    except VPTQError:
        if not job.workspace.has_block(0):
            job.leave_workspace()
        raise


@dataclass
class _Run:
    """One execution of a job."""

    job: Job
    progress: ProgressCallback
    reports: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers_in_all: int = 0
    layers_done: int = 0

    def execute(self, started: float) -> Report:
        job = self.job
        skeleton = job.open_skeleton()
        self.warnings.extend(job.check_layers(skeleton, self.progress))
        self.layers_in_all = sum(len(skeleton.linears(index)) for index in range(len(skeleton.blocks)))
        facts: dict[str, Any] = {"description": f"Hessian files of {job.hessian_dir}", "warning": None}
        activations = None
        if job.hessian_dir is None:
            tokens, facts = job.calibration_tokens(self.progress)
            activations = Activations(skeleton, tokens, job.compute_dtype)
        if facts["warning"]:
            self.warnings.append(facts["warning"])
        for index in range(len(skeleton.blocks)):
            self._block(skeleton, activations, index)
        report = self._report(skeleton, facts["description"], time.monotonic() - started)
        configs = {r.name: LayerConfig.from_entry(r.entry, r.name) for r in self.reports}
        write_output(
            job.output, skeleton, job.workspace, configs, job.dtype, job.tokenizer(), job.generation_config(), report,
            base_model=job.base_model, overwrite=job.overwrite,
        )  # fmt: skip
        job.workspace.remove()
        return report

    def _block(self, skeleton: Skeleton, activations: Activations | None, index: int) -> None:
        """Brings one block to its finished state and the activations to its output."""
        job = self.job
        finished = job.workspace.has_block(index)
        if activations is None and finished:
            self.reports.extend(job.workspace.block_reports(index))
            return
        skeleton.load_block(index, job.compute_dtype)
        if finished:
            self.layers_done += len(skeleton.linears(index))
            assert activations is not None
            if job.hessian_inputs == "quantized":
                self._install(skeleton, index)
            activations.run_block(index, advance=True)
        else:
            solved = self._solve_block(skeleton, activations, index)
            job.workspace.save_block(index, solved)
        self.reports.extend(job.workspace.block_reports(index))
        skeleton.unload_block(index)

    def _solve_block(
        self, skeleton: Skeleton, activations: Activations | None, index: int
    ) -> dict[str, tuple[LayerReport, Mapping[str, Tensor]]]:
        job = self.job
        solved: dict[str, tuple[LayerReport, Mapping[str, Tensor]]] = {}
        if activations is None:
            for group in _one_by_one(skeleton, index):
                hessian = self._stored_hessian(index, group)
                self._solve_group(skeleton, index, group, hessian, solved, install=False)
            return solved
        groups = activations.input_groups(index)
        if job.hessian_inputs == "original" or len(groups) > MAX_SEQUENTIAL_GROUPS:
            original = job.hessian_inputs == "original"
            for group, moments in zip(groups, activations.hessians(index, groups, advance=original), strict=True):
                self._solve_group(
                    skeleton, index, group, self._moment(index, group, moments), solved, install=not original
                )
        else:
            for group in groups:
                (moments,) = activations.hessians(index, [group])
                self._solve_group(skeleton, index, group, self._moment(index, group, moments), solved, install=True)
        if job.hessian_inputs == "quantized":
            activations.run_block(index, advance=True)
        order = list(skeleton.linears(index))
        return {name: solved[name] for name in (f"{skeleton.blocks_name}.{index}.{path}" for path in order)}

    def _solve_group(
        self,
        skeleton: Skeleton,
        index: int,
        group: InputGroup,
        hessian: Tensor,
        solved: dict[str, tuple[LayerReport, Mapping[str, Tensor]]],
        *,
        install: bool,
    ) -> None:
        """Quantizes the layers of one input group; with `install` the block goes on with what will be stored."""
        job = self.job
        linears = skeleton.linears(index)
        for path in group.names:
            name = f"{skeleton.blocks_name}.{index}.{path}"
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
                    bias=_bias(linear),
                    solver=job.solver,
                )
            except VPTQError as error:
                raise type(error)(f"{name}: {error}") from error
            weight = solution.weight.absorb_perm() if job.absorb_perm else solution.weight
            tensors = {key: tensor.cpu() for key, tensor in weight.to_tensors(job.dtype).items()}
            solved[name] = (self._layer_report(name, weight.config, solution, time.monotonic() - began), tensors)
            if install:
                linear.weight.data.copy_(dequantize(weight.config, tensors).to(linear.weight))

    def _install(self, skeleton: Skeleton, index: int) -> None:
        """Puts the stored weights of a finished block into its linear layers."""
        modules = skeleton.linears(index)
        for name, weight in self.job.workspace.block_weights(index):
            linear = modules[name.removeprefix(f"{skeleton.blocks_name}.{index}.")]
            linear.weight.data.copy_(dequantize(weight.config, weight.to_tensors(self.job.dtype)).to(linear.weight))

    def _moment(self, index: int, group: InputGroup, moments: Any) -> Tensor:
        """A group's Hessian; the identity, with a warning, for layers that no text has reached (rare experts)."""
        if moments.tokens == 0:
            self.warnings.append(
                f"block {index}: no calibration token reached {', '.join(group.names)}; plain k-means there"
            )
            return torch.eye(group.features, device=self.job.device)
        try:
            hessian: Tensor = moments.hessian()
            return hessian
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
        self.progress(ProgressEvent("quantizing layers", self.layers_done, self.layers_in_all, line, name))
        return report

    def _report(self, skeleton: Skeleton, calibration: str, seconds: float) -> Report:
        configs = {report.name: LayerConfig.from_entry(report.entry, report.name) for report in self.reports}
        weights = sum(config.in_features * config.out_features for config in configs.values())
        tied = getattr(skeleton.model, "all_tied_weights_keys", None) or {}
        total = sum(p.numel() for name, p in skeleton.model.named_parameters() if name not in tied)
        return Report(
            model=self.job.name,
            spec=self.job.spec.name,
            bits_per_weight=sum(config.stored_bits for config in configs.values()) / weights,
            layers=self.reports,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            calibration=calibration,
            seed=self.job.seed,
            quantized_weights=weights,
            total_weights=total,
            skipped=unquantized(skeleton, configs),
            warnings=self.warnings,
        )


def peak_memory_bytes() -> int:
    """Most memory this process has held at once, resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _one_by_one(skeleton: Skeleton, index: int) -> list[InputGroup]:
    return [InputGroup((name,), linear.in_features) for name, linear in skeleton.linears(index).items()]


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data
