"""How much each layer matters: what the model's predictions lose when that layer alone is quantized.

Each layer is quantized quickly with one reference spec, and the Kullback-Leibler divergence of the predictions from the
original's is measured over some calibration tokens. That is the quantity of interest itself: no Hessian, gradient or
weighing of layers stands in for it. For small errors divergences of single layers add up, and grow with the square of
the error, so one measurement per layer predicts every other spec (`candidates.py`).

The model is never in memory as a whole. All the models that differ from the original in one layer walk through the
blocks together, as hidden states: a block is loaded once, moves on every model disturbed before it, and sets out one
more for each of its own layers. It takes half a forward pass a layer, and memory for the hidden states of
JUDGED_TOKENS tokens a layer: SmolLM2 210 x 0.6 MB, a 7B model 224 x 4 MB in float32.

What a layer costs differs from passage to passage, by a factor of five at some, so many short ones are judged, and each
counts alike: no passage that everything hurts decides alone (docs/log.md has how well that holds on other text).

Experts of one block that have the same shape are measured, and later quantized, alike. An output head that a plan
chooses for is measured last, with the original's own hidden states.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vptq.errors import CalibrationError, VPTQError
from vptq.progress import ProgressCallback, ProgressEvent
from vptq.quantize.activations import Activations
from vptq.quantize.candidates import reference_of
from vptq.quantize.head import divergence_of
from vptq.quantize.hessian import HessianAccumulator, Moments
from vptq.quantize.job import Job
from vptq.quantize.parallel import map_layers
from vptq.quantize.skeleton import Skeleton, head_of, linears_of
from vptq.quantize.solver import SolverConfig
from vptq.reference import dequantize

SEQLEN = 64
JUDGED_TOKENS = 256
TOKENS_PER_INPUT = 2
"""Calibration tokens for each input of the widest layer: with fewer than one its Hessian would be singular, and the
error would hide where these tokens do not look."""

QUICK = SolverConfig(kmeans_iterations=5, residual_rounds=1, refit_rounds=0)


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of one layer, or of alike experts together.

    Attributes:
        layers: Module paths.
        spec: What they were quantized with.
        divergence: KL(original || quantized) per token, in nats (see `every_passage_alike`).
    """

    layers: tuple[str, ...]
    spec: str
    divergence: float


def alike_layers(blocks: Sequence[nn.Module], blocks_name: str) -> list[list[dict[str, nn.Linear]]]:
    """For each block its layers, those that get one spec together: path in the model -> linear layer."""
    found = []
    for index, block in enumerate(blocks):
        units: dict[tuple[str, torch.Size], dict[str, nn.Linear]] = {}
        for name, linear in linears_of(block).items():
            kind = re.sub(r"\d+", "*", name), linear.weight.shape
            units.setdefault(kind, {})[f"{blocks_name}.{index}.{name}"] = linear
        found.append(list(units.values()))
    return found


def measuring_tokens(job: Job, skeleton: Skeleton, progress: ProgressCallback) -> tuple[Tensor, Tensor]:
    """The tokens [n, seqlen] that predictions are judged on, and those that the Hessians are made of."""
    seqlen = min(job.seqlen, SEQLEN)
    judged = max(1, JUDGED_TOKENS // seqlen)
    widest = max(linear.in_features for block in skeleton.blocks for linear in linears_of(block).values())
    wanted = judged + -(-TOKENS_PER_INPUT * widest // seqlen)
    allowed = max(1, job.sequences * job.seqlen // seqlen)
    tokens = job.sample(min(wanted, allowed), seqlen, progress).tokens
    judged = min(judged, max(1, len(tokens) // 2))
    return tokens[:judged], tokens[judged:] if len(tokens) > judged else tokens


def measure(job: Job, skeleton: Skeleton, progress: ProgressCallback) -> list[Sensitivity]:
    """Measures every layer of the blocks, and the head if it is planned; the same job gives the same figures.

    Raises:
        CalibrationError: The model's predictions are not finite.
    """
    judged, rest = measuring_tokens(job, skeleton, progress)
    progress(ProgressEvent("measuring layers", 0, len(skeleton.blocks)))
    walk = _Walk(job, skeleton, judged, rest)
    units = alike_layers(skeleton.blocks, skeleton.blocks_name)
    for index, block_units in enumerate(units):
        progress(ProgressEvent("measuring layers", index, len(units)))
        walk.through_block(index, block_units)
    progress(ProgressEvent("judging predictions", 0, len(walk.disturbed)))
    found = []
    for divergences in walk.divergences(judged):
        found.append(divergences)
        progress(ProgressEvent("judging predictions", len(found), len(walk.disturbed)))
    names = [tuple(unit) for block in units for unit in block]
    if job.lm_head is not None:
        path, _ = head_of(skeleton.model)
        names.append((path,))
        found.append(walk.head_divergences(judged))
    return [Sensitivity(*seen) for seen in zip(names, walk.specs, every_passage_alike(found), strict=True)]


def every_passage_alike(found: Sequence[Sequence[float]]) -> list[float]:
    """One figure a layer from its divergences on several passages: its mean share of what all layers cost there.

    Args:
        found: for each layer its divergence on every passage.

    Returns:
        Figures with the same sum as the layers' means over passages.
    """
    table = torch.tensor(found, dtype=torch.float64)
    totals = table.sum(0)
    shares = table / totals.clamp(min=torch.finfo(torch.float64).tiny)
    figures: list[float] = (shares.mean(1) * totals.mean()).tolist()
    return figures


class _Walk:
    """The original and its disturbed copies on their way through the blocks."""

    def __init__(self, job: Job, skeleton: Skeleton, judged: Tensor, rest: Tensor) -> None:
        self._job, self._skeleton = job, skeleton
        self._original = Activations(skeleton, judged, job.compute_dtype)
        self._calibration = Activations(skeleton, rest, job.compute_dtype)
        self.disturbed: list[Activations] = []
        self.specs: list[str] = []

    def through_block(self, index: int, units: Sequence[Mapping[str, nn.Linear]]) -> None:
        """Moves all models past block `index`, and sets out one more for each unit."""
        self._skeleton.load_block(index, self._job.compute_dtype)
        for stream in self.disturbed:
            stream.run_block(index, advance=True)
        quantized = self._quantize(index, units)
        for unit in units:
            originals = {name: linear.weight.data for name, linear in unit.items()}
            for name, linear in unit.items():
                linear.weight.data = quantized[name]
            self.disturbed.append(self._original.fork())
            self.disturbed[-1].run_block(index, advance=True)
            for name, linear in unit.items():
                linear.weight.data = originals[name]
        self._original.run_block(index, advance=True)
        self._skeleton.unload_block(index)

    def divergences(self, judged: Tensor) -> Iterator[list[float]]:
        """For each disturbed model KL(original || disturbed) per token of every passage."""
        streams = (torch.cat(stream.batches) for stream in (self._original, *self.disturbed))
        logits = self._skeleton.logits(judged, streams, self._job.compute_dtype)
        original = next(logits)
        for disturbed in logits:
            yield _divergences(original, disturbed)

    def head_divergences(self, judged: Tensor) -> list[float]:
        """The same where the output head alone is quantized."""
        skeleton, job = self._skeleton, self._job
        path, head = head_of(skeleton.model)
        seen = HessianAccumulator(head.in_features, job.device)
        for states in skeleton.last_states(self._calibration.batches, job.compute_dtype):
            seen.add(states)
        self.specs.append(reference_of(job.candidates(head)).spec.name)
        (original,) = skeleton.logits(judged, [torch.cat(self._original.batches)], job.compute_dtype)
        weight = skeleton.files.load(f"{path}.weight")
        head.weight = nn.Parameter(self._solve((path, weight, head, seen.hessian())), requires_grad=False)
        (disturbed,) = skeleton.logits(judged, [torch.cat(self._original.batches)], job.compute_dtype)
        return _divergences(original, disturbed)

    def _quantize(self, index: int, units: Sequence[Mapping[str, nn.Linear]]) -> dict[str, Tensor]:
        """Quick quantizations of the block's layers with their reference specs; path in the model -> weight."""
        hessians = self._hessians(index)
        tasks = []
        for unit in units:
            linear = next(iter(unit.values()))
            spec = reference_of(self._job.candidates(linear)).spec
            self.specs.append(spec.name)
            tasks += [(name, linear.weight.data, linear, hessians[name]) for name, linear in unit.items()]
        sizes = [weight.numel() for _, weight, _, _ in tasks]
        solved = map_layers(self._solve, tasks, sizes, self._job.device, self._job.workers)
        return {name: weight for (name, *_), weight in zip(tasks, solved, strict=True)}

    def _solve(self, task: tuple[str, Tensor, nn.Linear, Tensor]) -> Tensor:
        name, weight, linear, hessian = task
        job = self._job
        config = dataclasses.replace(job.fit(reference_of(job.candidates(linear)).spec, linear), bias=False)
        try:
            stored = job.workers.solve(
                weight, Moments(hessian), config, job.seed_of(name), dtype=job.dtype, solver=QUICK
            )
        except VPTQError as error:
            raise type(error)(f"{name}: {error}") from error
        return dequantize(stored.config, stored.tensors).to(job.device, job.compute_dtype)

    def _hessians(self, index: int) -> dict[str, Tensor]:
        """Path in the model -> Hessian; the identity for experts that no token has reached."""
        groups = self._calibration.input_groups(index)
        seen = self._calibration.hessians(index, groups, advance=True)
        prefix = f"{self._skeleton.blocks_name}.{index}."
        found: dict[str, Tensor] = {}
        for group, accumulator in zip(groups, seen, strict=True):
            reached = accumulator.tokens > 0
            hessian = accumulator.hessian() if reached else torch.eye(group.features, device=self._job.device)
            found |= dict.fromkeys((prefix + name for name in group.names), hessian)
        return found


@torch.no_grad()
def _divergences(original: Tensor, disturbed: Tensor) -> list[float]:
    """KL(original || disturbed) of logits [passages, seqlen, vocabulary]: for each passage the mean over its tokens."""
    pairs = zip(original, disturbed, strict=True)  # a passage at a time: its logits are as much as caches hold
    found = [float(divergence_of(p, q)) / len(p) for p, q in pairs]
    if not sum(found) < float("inf"):
        raise CalibrationError("the model's predictions are not finite on the calibration text; try another text")
    return [max(divergence, 0.0) for divergence in found]
