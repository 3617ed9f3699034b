"""Training few numbers for few steps: codebooks, scales and norms, by Adam with steps in each tensor's own size.

A codebook's entries are about 1, a column's scale is the spread of its weights, a norm may be anything; one learning
rate fits all when it says which share of a tensor's root mean square a step may change. What is kept is the best state
seen on held-out text, measured with every number rounded as it will be stored, the untrained state included: training
cannot do harm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vptq.checkpoint import save_tensors, staged_folder, write_json
from vptq.linear import Codebook, VQuantLinear
from vptq.quantize.weights import WeightFiles

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        rate: share of a tensor's root mean square that a step changes, at the height of the schedule.
        epochs: times that every training sequence is seen.
        batch: sequences a step.
        warmup: share of the steps in which the rate rises; it falls by a half cosine after that.
        checks: how often held-out text is measured.
        patience: checks without a better result after which training ends.
    """

    rate: float = 2.5e-3
    epochs: int = 1
    batch: int = 1
    warmup: float = 0.1
    checks: int = 8
    patience: int = 3

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of step `step` of `steps`."""
        rising = max(1, round(self.warmup * steps))
        if step < rising:
            return self.rate * (step + 1) / rising
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The floats of quantized layers in `module` and the vectors of its norms, by name; they alone get gradients."""
    module.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, VQuantLinear):
            part.train_floats()
        elif not isinstance(part, nn.Embedding | nn.Linear | Codebook):
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(parameter.dim() == 1)
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@dataclass
class Trainer:
    """Parameters on their way, and the best they have been.

    Attributes:
        parameters: what is trained, by name; float32.
        dtype: what they are rounded to when they are stored.
        steps: how many there will be.
        indices: tensors that others change in place between steps, by name: part of the state, neither trained nor
            rounded.
        step: how many there were.
        best: the best state, parameters in `dtype`.
        history: (step, held-out loss) of every check.
    """

    parameters: Mapping[str, nn.Parameter]
    dtype: torch.dtype
    config: TrainingConfig
    steps: int
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = [{"params": [p], "unit": self._unit(name)} for name, p in self.parameters.items()]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.95), lr=0.0)

    def _unit(self, name: str) -> float:
        # A column's bias has no size of its own: what counts is the spread of the column it moves.
        name = name.removesuffix("weight_bias") + "weight_scale" if name.endswith("weight_bias") else name
        return float(self.parameters[name].detach().square().mean().sqrt().clamp(min=1e-8))

    def advance(self) -> None:
        """One step along the gradients that have been collected, which are then forgotten."""
        for group in self._adam.param_groups:
            group["lr"] = self.config.rate_at(self.step, self.steps) * group["unit"]
        self._adam.step()
        self._adam.zero_grad()
        self.step += 1

    def check(self, measure: Callable[[], float]) -> float:
        """The held-out loss of what would be stored now, which is kept if it is the best so far."""
        with self._rounded():
            loss = measure()
            loss = loss if math.isfinite(loss) else math.inf
            if not self.history or loss < min(past for _, past in self.history):
                self.best = {name: p.detach().to("cpu", self.dtype, copy=True) for name, p in self.parameters.items()}
                self.best |= {name: index.to("cpu", copy=True) for name, index in self.indices.items()}
        self.history.append((self.step, loss))
        return loss

    @property
    def done(self) -> bool:
        """Whether all steps were made, or the last checks brought nothing better."""
        losses = [loss for _, loss in self.history]
        return self.step >= self.steps or len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def check_is_due(self) -> bool:
        """Checks are spread evenly, the last one after the last step."""
        checks, now = self.config.checks, self.step
        return now * checks // self.steps > (now - 1) * checks // self.steps

    def save(self, folder: Path) -> None:
        """Everything that `restore` needs, in place of what is there."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"now/{name}": index for name, index in self.indices.items()}
        for name, parameter in self.parameters.items():
            tensors[f"now/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": moment for key, moment in self._adam.state[parameter].items()}
        with staged_folder(folder, overwrite=True) as staging:
            save_tensors(staging, tensors.items())
            write_json(staging / "steps.json", {"step": self.step, "history": self.history})

    def restore(self, folder: Path) -> None:
        """Goes on from what `save` stored, if it has."""
        if not folder.is_dir():
            return
        files, steps = WeightFiles(folder), json.loads((folder / "steps.json").read_text(encoding="utf-8"))
        self.step, self.history = steps["step"], [(step, loss) for step, loss in steps["history"]]
        for name, tensor in (*self.parameters.items(), *self.indices.items()):
            tensor.detach().copy_(files.load(f"now/{name}"))
            self.best[name] = files.load(f"best/{name}")
        for name, parameter in self.parameters.items():
            for key in ADAM_STATE if self.step else ():
                stored = files.load(f"{key}/{name}")
                self._adam.state[parameter][key] = stored if key == "step" else stored.to(parameter.device)

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        exact = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for p in self.parameters.values():
                p.copy_(p.to(self.dtype))
            try:
                yield
            finally:
                for name, p in self.parameters.items():
                    p.copy_(exact[name])
