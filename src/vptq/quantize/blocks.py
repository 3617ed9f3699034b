"""Quantizing the linear layers of one decoder block: which Hessians, in which order, and what is reported.

In "quantized" mode a layer is solved against what the quantized layers before it really feed it, inside the block too.
In "original" mode all Hessians of a block come from one pass of the original model, as published Hessian files do. In
"both" mode both models run, and a layer is solved for the inputs of either (`paired.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.errors import CalibrationError
from vptq.progress import ProgressCallback, ProgressEvent
from vptq.quantize.activations import MAX_SEQUENTIAL_GROUPS, Activations, InputGroup
from vptq.quantize.block_tuning import TunedBlock, tune_block
from vptq.quantize.fisher import LossWeights
from vptq.quantize.hessian import HessianAccumulator, Moments, PairedAccumulator, load_hessian
from vptq.quantize.job import Job
from vptq.quantize.layers import SolvedLayer, solve_layer
from vptq.quantize.memory import return_freed_memory
from vptq.quantize.paired import PairedActivations
from vptq.quantize.parallel import map_layers
from vptq.quantize.report import LayerReport
from vptq.quantize.skeleton import Skeleton
from vptq.reference import dequantize

Solved = dict[str, tuple[LayerReport, Mapping[str, Tensor]]]
"""Module path -> its report and its tensors by on-disk name."""


@dataclass
class BlockSolver:
    """Brings one decoder block after the other to its finished, stored state.

    Attributes:
        activations: hidden states at the input of the next block: of the original in "original" mode, otherwise of
            the quantized model; None when Hessians come from files, and in "both" mode unless blocks are trained.
        pairs: those of both models in "both" mode.
        weights: what rows and calibration tokens count to each layer; all alike where that is missing.
        warnings: lines for the report, collected while solving.
        layers_done: for the progress bar.
    """

    job: Job
    skeleton: Skeleton
    activations: Activations | None
    pairs: PairedActivations | None
    weights: LossWeights
    progress: ProgressCallback
    warnings: list[str] = field(default_factory=list)
    layers_done: int = 0

    @classmethod
    def start(
        cls, job: Job, skeleton: Skeleton, tokens: Tensor | None, weights: LossWeights,
        progress: ProgressCallback, warnings: list[str],
    ) -> BlockSolver:  # fmt: skip
        """At the first block, with the calibration text [sequences, seqlen] or, for Hessians from files, none."""
        activations, pairs = None, None
        if tokens is not None and job.hessian_inputs == "both":
            pairs = PairedActivations.start(skeleton, tokens, job.compute_dtype)
            activations = pairs.original.fork() if job.trains_blocks else None
        elif tokens is not None:
            activations = Activations(skeleton, tokens, job.compute_dtype, quick=True)
        return cls(job, skeleton, activations, pairs, weights, progress, warnings)

    def finish_block(self, index: int) -> None:
        """Quantizes and stores block `index`, or takes it from an interrupted run; the activations advance past it."""
        job, workspace = self.job, self.job.workspace
        path = f"{self.skeleton.blocks_name}.{index}"
        self.progress(ProgressEvent("quantizing layers", self.layers_done, self.skeleton.num_linears, layer=path))
        self.skeleton.load_block(index, job.compute_dtype)
        if not workspace.has_block(index):
            solved, tuned = self._solve(index)
            workspace.save_block(index, solved, tuned)
        else:
            self.layers_done += len(self.skeleton.linears(index))
            if self.pairs is not None:
                self.pairs.original.run_block(index, advance=True)
            if job.hessian_inputs != "original" and job.hessian_dir is None:
                self._install(index)
            self._advance(index)
        self.skeleton.unload_block(index)
        return_freed_memory()

    def _solve(self, index: int) -> tuple[Solved, TunedBlock | None]:
        """Quantizes the block, and trains it if that is asked for; the activations advance past it."""
        before = copy.deepcopy(self.skeleton.blocks[index]) if self.job.trains_blocks else None
        if self.pairs is not None:
            solved = self._solve_pairs(self.pairs, index)
        elif self.activations is not None:
            solved = self._solve_with(self.activations, index)
        else:
            groups = [InputGroup((name,), linear.in_features) for name, linear in self.skeleton.linears(index).items()]
            solved = self._solve_groups(index, [(group, self._stored_moments(index, group)) for group in groups])
        tuned = None
        if before is not None and self.activations is not None:
            tuned = self._tune(self.activations, index, solved, before)
        if self.job.hessian_inputs != "original":
            self._advance(index)
        return {name: solved[name] for name in map(partial(self._path, index), self.skeleton.linears(index))}, tuned

    def _advance(self, index: int) -> None:
        """What goes through the quantized model goes through block `index`."""
        for activations in (None if self.pairs is None else self.pairs.quantized, self.activations):
            if activations is not None:
                activations.run_block(index, advance=True)

    def _solve_with(self, activations: Activations, index: int) -> Solved:
        """Solves the block with Hessians of one model's activations; those of the original advance past it."""
        groups = activations.input_groups(index)
        original = self.job.hessian_inputs == "original"
        at_once = original or len(groups) > MAX_SEQUENTIAL_GROUPS
        solved: Solved = {}
        for some in [groups] if at_once else [[group] for group in groups]:
            weights = [self._weights(index, group) for group in some]
            accumulated = activations.hessians(index, some, weights=weights, advance=original)
            moments = [self._moments(index, group, seen) for group, seen in zip(some, accumulated, strict=True)]
            solved |= self._solve_groups(index, list(zip(some, moments, strict=True)))
        return solved

    def _solve_pairs(self, pairs: PairedActivations, index: int) -> Solved:
        """Solves the block with moments of both models' inputs; the original's activations advance past it."""
        groups = pairs.original.input_groups(index)
        weights = [self._weights(index, group) for group in groups]
        pairs.run_original(index, groups, weights)
        if len(groups) > MAX_SEQUENTIAL_GROUPS:
            seen = [(group, self._moments(index, group, pairs.hessian(group))) for group in groups]
            return self._solve_groups(index, seen)
        solved: Solved = {}
        for group, counts in zip(groups, weights, strict=True):
            moments = self._moments(index, group, pairs.moments(index, group, counts))
            solved |= self._solve_groups(index, [(group, moments)])
            pairs.quantized.settle(index, group.names)
        return solved

    def _tune(self, activations: Activations, index: int, solved: Solved, before: nn.Module) -> TunedBlock:
        """Trains the block; `solved` and the block itself take over what is better."""
        prefix = f"{self.skeleton.blocks_name}.{index}."
        configs = {path: LayerConfig.from_entry(report.entry, path) for path, (report, _) in solved.items()}
        layers = {path.removeprefix(prefix): (configs[path], tensors) for path, (_, tensors) in solved.items()}
        tuned = tune_block(
            before, layers, activations.batches, partial(activations.call, index=index), self.job.dtype,
            self.job.training, lambda done, total: self.progress(ProgressEvent(f"training block {index}", done, total)),
        )  # fmt: skip
        for path, (report, tensors) in solved.items():
            solved[path] = report, {**tensors, **tuned.layers[path.removeprefix(prefix)]}
        others = {f"{prefix}{name}": tensor for name, tensor in tuned.others.items()}
        self._take_over(index, {path: (configs[path], tensors) for path, (_, tensors) in solved.items()}, others)
        if self.pairs is not None:
            self.pairs.quantized.unsettle()
        message = f"block {index}: error of its output {tuned.before:.3%} before training, {tuned.after:.3%} after"
        self.progress(ProgressEvent("training blocks", index + 1, len(self.skeleton.blocks), message=message))
        return dataclasses.replace(tuned, others=others)

    def _solve_groups(self, index: int, groups: Sequence[tuple[InputGroup, Moments]]) -> Solved:
        """Quantizes the layers of some input groups; the block goes on with what will be stored, unless it should stay
        the original."""
        linears = self.skeleton.linears(index)
        tasks = [(name, moments) for group, moments in groups for name in group.names]
        tasks.sort(key=lambda task: -linears[task[0]].weight.numel())
        sizes = [linears[name].weight.numel() for name, _ in tasks]
        solved: Solved = {}
        solve = partial(self._solve_layer, index)
        for layer in map_layers(solve, tasks, sizes, self.job.device, self.job.workers):
            path = layer.report.name
            solved[path] = (layer.report, layer.tensors)
            self._tell(layer)
            if self.job.hessian_inputs != "original":
                self._take_over(index, {path: (layer.config, layer.tensors)}, {})
        return solved

    def _solve_layer(self, index: int, task: tuple[str, Moments]) -> SolvedLayer:
        """One layer; called from several threads at once."""
        name, moments = task
        path, linear = self._path(index, name), self.skeleton.linears(index)[name]
        bias = None if linear.bias is None else linear.bias.data
        config, rows = self.job.layer_config(path, linear), self.weights.of_rows(path)
        return solve_layer(self.job, path, linear.weight.data, bias, moments, config, rows)

    def _path(self, index: int, name: str) -> str:
        return f"{self.skeleton.blocks_name}.{index}.{name}"

    def _install(self, index: int) -> None:
        """Puts what is stored of a finished block into its place."""
        workspace, dtype = self.job.workspace, self.job.dtype
        layers = {name: (weight.config, weight.to_tensors(dtype)) for name, weight in workspace.block_weights(index)}
        self._take_over(index, layers, workspace.block_others(index))

    def _take_over(
        self, index: int, layers: Mapping[str, tuple[LayerConfig, Mapping[str, Tensor]]], others: Mapping[str, Tensor]
    ) -> None:
        """The block goes on with these quantized layers, by path, and these other tensors, by full name."""
        modules = {self._path(index, name): linear for name, linear in self.skeleton.linears(index).items()}
        for path, (config, tensors) in layers.items():
            linear = modules[path]
            there = {name: tensor.to(linear.weight.device) for name, tensor in tensors.items()}
            linear.weight.data.copy_(dequantize(config, there).to(linear.weight))
            if linear.bias is not None:
                linear.bias.data.copy_(tensors["bias"])
        for name, tensor in others.items():
            self.skeleton.blocks[index].get_parameter(name.removeprefix(self._path(index, ""))).data.copy_(tensor)

    def _weights(self, index: int, group: InputGroup) -> Tensor | None:
        return self.weights.of_tokens([self._path(index, name) for name in group.names])

    def _moments(self, index: int, group: InputGroup, seen: HessianAccumulator | PairedAccumulator) -> Moments:
        """A group's moments; the identity, with a warning, for layers that no text has reached (rare experts)."""
        if seen.tokens == 0:
            self.warnings.append(
                f"block {index}: no calibration token reached {', '.join(group.names)}; plain k-means there"
            )
            return Moments(torch.eye(group.features, device=self.job.device))
        try:
            return seen.moments(self.job.solver.damping)
        except CalibrationError as error:
            raise CalibrationError(f"block {index}, inputs of {', '.join(group.names)}: {error}") from error

    def _stored_moments(self, index: int, group: InputGroup) -> Moments:
        assert self.job.hessian_dir is not None
        tails = [name.rpartition(".")[2] for name in group.names]
        return Moments(load_hessian(self.job.hessian_dir, index, tails, group.features).to(self.job.device))

    def _tell(self, layer: SolvedLayer) -> None:
        self.warnings += layer.warnings
        self.layers_done += 1
        report, total = layer.report, self.skeleton.num_linears
        line = f"{report.name}  loss {report.loss:.3%}  {layer.config.bits_per_weight:.2f} bits"
        self.progress(ProgressEvent("quantizing layers", self.layers_done, total, line, report.name, report.loss))
