"""Block-wise finetuning: when a decoder block is quantized, its floats are trained to give the original's output.

For the inputs that the quantized blocks before it produce, the block's codebooks, column scales and biases, layer
biases and norms minimize |f(x) - g(x)|^2, with f the original block and g the quantized one; indices stay. The error is
relative to what the original block adds to its input. One epoch costs about what four passes of the block do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.linear import VQuantLinear
from vptq.quantize.training import Trainer, TrainingConfig, trained_parameters

HELD_OUT_SHARE = 16
"""One batch of calibration sequences in so many only judges (at least one)."""


@dataclass(frozen=True)
class TunedBlock:
    """What training made of a block.

    Attributes:
        layers: path of a quantized layer inside the block -> its trained tensors by on-disk name, in the storage dtype;
            empty where nothing was better.
        others: the same for all else, by path inside the block.
        before: relative squared error of the block's output on held-out sequences.
        after: the same of what was kept.
    """

    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]
    before: float
    after: float


def tune_block(
    original: nn.Module,
    layers: Mapping[str, tuple[LayerConfig, Mapping[str, Tensor]]],
    batches: list[Tensor],
    call: Callable[..., Tensor],
    dtype: torch.dtype,
    config: TrainingConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TunedBlock:
    """Trains one quantized block.

    Args:
        original: the block with its original weights; not changed.
        layers: path inside the block -> config and stored tensors of each quantized layer.
        batches: hidden states [batch, seqlen, width] that enter the quantized block; the last ones only judge.
        call: runs a block, its only positional argument, on `hidden`, [batch, seqlen, width].
        dtype: what trained tensors are rounded to.
        config: rate, epochs and so on; `batch` counts batches of hidden states here.
        progress: told (steps done, steps in all).

    Returns:
        The best state found, by the held-out batches.
    """
    student = _student(original, layers).to(next(original.parameters()).device)
    held_out = max(1, len(batches) // HELD_OUT_SHARE)
    judges, texts = batches[len(batches) - held_out :], batches[: max(1, len(batches) - held_out)]
    steps = max(1, len(texts) * config.epochs)
    trainer = Trainer(trained_parameters(student), dtype, config, steps)

    def error(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            target = call(original, hidden=hidden).float()
        output = call(student, hidden=hidden.float())
        return (output - target).square().sum() / (target - hidden.to(target)).square().sum().clamp(min=1e-20)

    def judge() -> float:
        return sum(error(hidden).item() for hidden in judges) / len(judges)

    trainer.check(judge)
    while not trainer.done:
        with torch.enable_grad():
            error(texts[trainer.step % len(texts)]).backward()  # type: ignore[no-untyped-call]
        trainer.advance()
        progress(trainer.step, steps)
        if trainer.check_is_due():
            trainer.check(judge)
    losses = [loss for _, loss in trainer.history]
    others = trainer.best if min(losses) < losses[0] else {}
    tuned: dict[str, dict[str, Tensor]] = {}
    for path in layers:
        names = [name for name in others if name.startswith(f"{path}.")]
        tuned[path] = {name.removeprefix(f"{path}."): others.pop(name) for name in names}
    return TunedBlock(tuned, others, losses[0], min(losses))


def _student(original: nn.Module, layers: Mapping[str, tuple[LayerConfig, Mapping[str, Tensor]]]) -> nn.Module:
    student = copy.deepcopy(original).float()
    for path, (config, tensors) in layers.items():
        student.set_submodule(path, VQuantLinear.from_tensors(config, tensors, torch.float32))
    return student
