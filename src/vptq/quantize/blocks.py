"""Quantizing the linear layers of one decoder block: which Hessians, in which order, and what is reported.

In "quantized" mode a layer is solved against what the quantized layers before it really feed it, inside the block too.
In "original" mode all Hessians of a block come from one pass of the original model, as published Hessian files do. In
"both" mode both models run, and a layer is solved for the inputs of either (`hessian.PairedAccumulator`): those of the
original come from one pass over the whole text, those of both at once from a part of it.
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
from vptq.quantize.activations import MAX_SEQUENTIAL_GROUPS, Activations, InputGroup
from vptq.quantize.block_tuning import TunedBlock, tune_block
from vptq.quantize.fisher import group_weights
from vptq.quantize.hessian import HessianAccumulator, Moments, PairedAccumulator, load_hessian
from vptq.quantize.job import Job
from vptq.quantize.layers import SolvedLayer, solve_layer
from vptq.quantize.memory import return_freed_memory
from vptq.quantize.parallel import map_layers
from vptq.quantize.report import LayerReport, ProgressCallback, ProgressEvent
from vptq.quantize.skeleton import Skeleton
from vptq.reference import dequantize

Solved = dict[str, tuple[LayerReport, Mapping[str, Tensor]]]
"""Module path -> its report and its tensors by on-disk name."""

PAIRED_EVERY = 4
"""In "both" mode the inputs of the two models are compared on one batch in so many (docs/log.md has what it costs)."""


@dataclass(frozen=True)
class _Pairs:
    """What the original makes of a block's inputs.

    Attributes:
        block: with the original's weights.
        sample: the original's hidden states at its input, one batch in `PAIRED_EVERY`.
        hessians: first layer of an input group -> E[x x^T] of the original over all of the text.
    """

    block: nn.Module
    sample: Activations
    hessians: Mapping[str, HessianAccumulator]


@dataclass
class BlockSolver:
    """Brings one decoder block after the other to its finished, stored state.

    Attributes:
        activations: hidden states at the input of the next block; None when Hessians come from files.
        token_weights: what each calibration token counts to a layer, by module path; all alike where it is missing.
        warnings: lines for the report, collected while solving.
        layers_done: for the progress bar.
        original: hidden states of the original, where both models count.
    """

    job: Job
    skeleton: Skeleton
    activations: Activations | None
    token_weights: Mapping[str, Tensor]
    progress: ProgressCallback
    warnings: list[str] = field(default_factory=list)
    layers_done: int = 0
    original: Activations | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.activations is not None and self.job.hessian_inputs == "both":
            self.original = self.activations.fork()

    def finish_block(self, index: int) -> None:
        """Quantizes and stores block `index`, or takes it from an interrupted run; the activations advance past it."""
        job, workspace = self.job, self.job.workspace
        self.skeleton.load_block(index, job.compute_dtype)
        if not workspace.has_block(index):
            solved, tuned = self._solve(index)
            workspace.save_block(index, solved, tuned)
        else:
            self.layers_done += len(self.skeleton.linears(index))
            if self.original is not None:
                self.original.run_block(index, advance=True)
            if self.activations is not None:
                if job.hessian_inputs != "original":
                    self._install(index)
                self.activations.run_block(index, advance=True)
        self.skeleton.unload_block(index)
        return_freed_memory()

    def _solve(self, index: int) -> tuple[Solved, TunedBlock | None]:
        tuned = None
        if self.activations is None:
            groups = [InputGroup((name,), linear.in_features) for name, linear in self.skeleton.linears(index).items()]
            solved = self._solve_groups(index, [(group, self._stored_moments(index, group)) for group in groups])
        else:
            solved, tuned = self._solve_with(self.activations, index)
        return {name: solved[name] for name in map(partial(self._path, index), self.skeleton.linears(index))}, tuned

    def _solve_with(self, activations: Activations, index: int) -> tuple[Solved, TunedBlock | None]:
        """Solves the block with Hessians of its activations, and moves those past it."""
        groups = activations.input_groups(index)
        original = self.job.hessian_inputs == "original"
        at_once = original or len(groups) > MAX_SEQUENTIAL_GROUPS
        before = copy.deepcopy(self.skeleton.blocks[index]) if self.original or self.job.trains_blocks else None
        pairs = None if before is None else self._run_original(index, before, [] if at_once else groups)
        solved: Solved = {}
        for some in [groups] if at_once else [[group] for group in groups]:
            if pairs is not None and not at_once:
                moments = [self._paired(activations, index, some[0], pairs)]
            else:
                weights = [self._weights(index, group) for group in some]
                accumulated = activations.hessians(index, some, weights=weights, advance=original)
                moments = [self._moments(index, group, seen) for group, seen in zip(some, accumulated, strict=True)]
            solved |= self._solve_groups(index, list(zip(some, moments, strict=True)))
        tuned = None
        if self.job.trains_blocks and before is not None:
            tuned = self._tune(activations, index, solved, before)
        if not original:
            activations.run_block(index, advance=True)
        return solved, tuned

    def _tune(self, activations: Activations, index: int, solved: Solved, before: nn.Module) -> TunedBlock:
        """Trains the block; `solved` and the block itself take over what is better."""
        prefix = f"{self.skeleton.blocks_name}.{index}."
        layers = {
            path.removeprefix(prefix): (LayerConfig.from_entry(report.entry, path), tensors)
            for path, (report, tensors) in solved.items()
        }
        tuned = tune_block(
            before, layers, activations.batches, partial(activations.call, index=index), self.job.dtype,
            self.job.training, lambda done, total: self.progress(ProgressEvent(f"training block {index}", done, total)),
        )  # fmt: skip
        for path, (report, tensors) in solved.items():
            solved[path] = report, {**tensors, **tuned.layers[path.removeprefix(prefix)]}
        others = {f"{prefix}{name}": tensor for name, tensor in tuned.others.items()}
        self._take_over(
            index, {path: (LayerConfig.from_entry(r.entry, path), t) for path, (r, t) in solved.items()}, others
        )
        message = f"block {index}: error of its output {tuned.before:.3%} before training, {tuned.after:.3%} after"
        self.progress(ProgressEvent("training blocks", index + 1, len(self.skeleton.blocks), message=message))
        return dataclasses.replace(tuned, others=others)

    def _run_original(self, index: int, before: nn.Module, groups: Sequence[InputGroup]) -> _Pairs | None:
        """The original runs through the block, which is still its own; None where it does not run along."""
        if self.original is None:
            return None
        sample = self.original.fork(PAIRED_EVERY)
        weights = [self._weights(index, group) for group in groups]
        seen = self.original.hessians(index, groups, weights=weights, advance=True)
        return _Pairs(before, sample, {group.names[0]: hessian for group, hessian in zip(groups, seen, strict=True)})

    def _paired(self, activations: Activations, index: int, group: InputGroup, pairs: _Pairs) -> Moments:
        """One pass of the block as it was, and as it is now, up to the inputs of `group`."""
        name = group.names[0]
        paired = PairedAccumulator(pairs.hessians[name])
        counts = activations.split(self._weights(index, group))[::PAIRED_EVERY]
        was = pairs.sample.inputs_of(name, index, block=pairs.block)
        for x, y, count in zip(was, activations.inputs_of(name, index, every=PAIRED_EVERY), counts, strict=True):
            if y is not None:  # an expert may get other tokens than it did, or none
                paired.add(y if x is None or x.shape != y.shape else x, y, count)
        return self._moments(index, group, paired)

    def _solve_groups(self, index: int, groups: Sequence[tuple[InputGroup, Moments]]) -> Solved:
        """Quantizes the layers of some input groups; the block goes on with what will be stored, unless it should stay
        the original."""
        linears = self.skeleton.linears(index)
        tasks = [(name, moments) for group, moments in groups for name in group.names]
        tasks.sort(key=lambda task: -linears[task[0]].weight.numel())
        sizes = [linears[name].weight.numel() for name, _ in tasks]
        solved: Solved = {}
        solve = partial(self._solve_layer, index)
        for layer in map_layers(solve, tasks, sizes, self.job.device):
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
        return solve_layer(self.job, path, linear.weight.data, bias, moments, self.job.layer_config(path, linear))

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
            linear.weight.data.copy_(dequantize(config, tensors).to(linear.weight))
            if linear.bias is not None:
                linear.bias.data.copy_(tensors["bias"])
        for name, tensor in others.items():
            self.skeleton.blocks[index].get_parameter(name.removeprefix(self._path(index, ""))).data.copy_(tensor)

    def _weights(self, index: int, group: InputGroup) -> Tensor | None:
        return group_weights(self.token_weights, [self._path(index, name) for name in group.names])

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
        line = f"{layer.report.name}  loss {layer.report.loss:.3%}  {layer.config.bits_per_weight:.2f} bits"
        total = self.skeleton.num_linears
        self.progress(ProgressEvent("quantizing layers", self.layers_done, total, line, layer.report.name))
