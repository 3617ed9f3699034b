"""Which spec each layer gets under a budget, and what that is expected to cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vptq.quantize.allocate import Option, allocate
from vptq.quantize.budget import Budget
from vptq.quantize.candidates import Candidate
from vptq.quantize.job import Job
from vptq.quantize.sensitivity import Sensitivity, alike_layers
from vptq.quantize.skeleton import find_blocks, head_of
from vptq.spec import QuantSpec
from vptq.transformers_versions import tied_weights

HEADER_BYTES = 128
"""A tensor's entry in a safetensors header beside its name, generously."""


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        name: Module path.
        spec: Name of its spec.
        bits: What it will take to store, codebooks and scales included.
        weights: How many it has.
        divergence: KL(original || quantized) per token in nats that is expected of it; the layers' add up.
    """

    name: str
    spec: str
    bits: int
    weights: int
    divergence: float


@dataclass(frozen=True)
class Plan:
    """What a budget buys.

    Attributes:
        model: Name of the original.
        budget: Such as "2.25 bits".
        layers: In the model's order.
        file_bytes: Bytes of all weight files at most.
    """

    model: str
    budget: str
    layers: tuple[PlannedLayer, ...]
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Every stored bit of the planned layers over their weights."""
        return sum(layer.bits for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def divergence(self) -> float:
        """Expected KL(original || quantized) per token, in nats: the sum over the layers."""
        return sum(layer.divergence for layer in self.layers)

    @property
    def summary(self) -> str:
        """How many layers have which spec, the most frequent first."""
        counts = Counter(layer.spec for layer in self.layers)
        return ", ".join(f"{count} x {spec}" for spec, count in counts.most_common())

    def specs(self, base: QuantSpec) -> dict[str, QuantSpec]:
        """Path -> spec, with the norm and perm of `base`."""
        rest = {"enable_norm": base.enable_norm, "enable_perm": base.enable_perm}
        return {layer.name: dataclasses.replace(QuantSpec.parse(layer.spec), **rest) for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` gives an equal plan."""
        figures = {"bits_per_weight": self.bits_per_weight, "divergence": self.divergence}
        return {**asdict(self), **figures, "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan back."""
        layers = tuple(PlannedLayer(**layer) for layer in data["layers"])
        return cls(data["model"], data["budget"], layers, data["file_bytes"])


@dataclass(frozen=True)
class Choices:
    """What there is to choose from, before anything is measured.

    Attributes:
        units: Paths of the layers that get one spec together.
        candidates: For each unit what each of its layers may be.
        weights: In all units.
        other_bytes: Of everything in the weight files that is not a quantized weight.
    """

    units: list[tuple[str, ...]]
    candidates: list[list[Candidate]]
    weights: int
    other_bytes: int

    @classmethod
    def of(cls, job: Job, model: nn.Module) -> Choices:
        """The choices that a model has under a job's settings; no weights are read."""
        name, blocks = find_blocks(model)
        units = [unit for block in alike_layers(blocks, name) for unit in block]
        units += [dict([head_of(model)])] if job.lm_head is not None else []
        candidates = [job.candidates(next(iter(unit.values()))) for unit in units]
        linears = {path: linear for unit in units for path, linear in unit.items()}
        return cls(
            [tuple(unit) for unit in units],
            candidates,
            sum(linear.weight.numel() for linear in linears.values()),
            _other_bytes(model, linears),
        )

    def check(self, budget: Budget) -> None:
        """Refuses a budget out of reach.

        Raises:
            ConfigError: With what is in reach.
        """
        bits = [[len(unit) * c.config.stored_bits for c in some] for unit, some in self._pairs()]
        budget.check(sum(map(min, bits)), sum(map(max, bits)), self.weights, self.other_bytes)

    def plan(self, budget: Budget, measured: Sequence[Sensitivity], model: str) -> Plan:
        """The candidates that lose least within the budget.

        Args:
            budget: In reach.
            measured: One for each unit, in their order.
            model: Its name.
        """
        options = [
            [Option(len(unit) * c.config.stored_bits, _expected(c, some, seen)) for c in some]
            for (unit, some), seen in zip(self._pairs(), measured, strict=True)
        ]
        chosen = allocate(options, budget.for_layers(self.weights, self.other_bytes))
        layers = []
        for (unit, some), choices, number in zip(self._pairs(), options, chosen, strict=True):
            config, damage = some[number].config, choices[number].damage / len(unit)
            size = config.in_features * config.out_features
            layers += [PlannedLayer(n, some[number].spec.name, config.stored_bits, size, damage) for n in unit]
        file_bytes = -(-sum(layer.bits for layer in layers) // 8) + self.other_bytes
        return Plan(model, str(budget), tuple(layers), file_bytes)

    def _pairs(self) -> list[tuple[tuple[str, ...], list[Candidate]]]:
        return list(zip(self.units, self.candidates, strict=True))


def _expected(candidate: Candidate, some: Sequence[Candidate], measured: Sensitivity) -> float:
    """A unit's divergence with one candidate, from that with the candidate it was measured with."""
    reference = next(other for other in some if other.spec.name == measured.spec)
    return measured.divergence * candidate.gaussian_loss / reference.gaussian_loss


def _other_bytes(model: nn.Module, linears: Mapping[str, nn.Linear]) -> int:
    """Bytes of the weight files beside quantized weights: other tensors in 16 bits, biases, headers."""
    tied, quantized = tied_weights(model), {f"{name}.weight" for name in linears}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    rest = {name: tensor for name, tensor in tensors.items() if name not in quantized}
    stored: int = sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in rest.values())
    parts = 6  # tensors of a quantized layer at most: two codebooks, indices, perm, scale, shift
    names = [*rest, *(name for name in quantized for _ in range(parts))]
    return stored + sum(len(name) + HEADER_BYTES for name in names)
