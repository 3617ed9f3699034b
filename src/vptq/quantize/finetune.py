"""End-to-end finetuning: a quantized folder in, a folder of the same format and size out, closer to its original.

Codebooks, column scales and biases, layer biases and norms are trained so that the model's next-token distributions
become those of the original (KL divergence on the calibration text); embeddings and the output head stay, and so do
indices unless some are asked to move (`move_turns.py`). The paper's 2-bit results need this step (arXiv 2409.17066,
section 4 and appendix C.5), which was never released.

    original, tokens -> last hidden states of the original, stored      one block in memory at a time
    quantized folder -> Student -> Trainer, checked on held-out text    its state is stored at every check
    best state       -> the folder again, with those tensors replaced

Everything lies in the work folder as soon as it is finished, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vptq.checkpoint import Checkpoint, save_tensors, staged_folder
from vptq.errors import CalibrationError, VPTQError
from vptq.progress import ProgressCallback, ProgressEvent
from vptq.quantize.activations import Activations
from vptq.quantize.index_moves import differing
from vptq.quantize.move_turns import MoveTurns
from vptq.quantize.original import compute_dtype
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.student import Student
from vptq.quantize.training import Trainer, TrainingConfig
from vptq.quantize.weights import WeightFiles
from vptq.weight import QuantizedWeight

TARGET_SHARD_BYTES = 1 << 28
STAGE = "finetuning"
FULL_RATE_DIVERGENCE = 0.6
"""Nats a token from which on steps have their full size. Adam's steps are as large where little is left to win, and
what they disturb grows with their square: so they shrink with the root of the divergence. A model at 3 bits, 0.156
nats, came to 0.161 and 0.167 by full steps and to 0.147 by half as large ones (docs/log.md)."""
JUDGES = 2
"""Training sequences that judge the moves of a turn: the next ones, which it has not seen."""


def rate_share(divergence: float) -> float:
    """What share of the full rate suits a model that begins with this divergence, in nats a token."""
    return min(1.0, math.sqrt(divergence / FULL_RATE_DIVERGENCE))


@dataclass(frozen=True)
class FinetuneReport:
    """What end-to-end finetuning did.

    Attributes:
        before: KL(original || quantized) a token on held-out text, in nats.
        after: the same of what was kept; equal to `before` when training brought nothing.
        steps: optimizer steps made.
        history: [step, held-out divergence] of every check.
        sequences: training sequences.
        held_out: sequences that only judge.
        trained: numbers that were trained.
        moved: vectors whose indices, in what was kept, are not those they were.
        seconds: wall-clock time, that of the original's states included.
    """

    before: float
    after: float
    steps: int
    history: list[tuple[int, float]]
    sequences: int
    held_out: int
    trained: int
    moved: int
    seconds: float


@dataclass
class Finetuning:
    """One run; what is already in `work` is not done again.

    Attributes:
        folder: the quantized model.
        skeleton: the original.
        tokens: [sequences, seqlen]; the last `held_out` are not trained on.
        work: where intermediate results go.
        dtype: what trained numbers are rounded to.
        device: where to compute.
        move_indices: share of all vectors that may get other indices; 0 for none.
    """

    folder: Path
    skeleton: Skeleton
    tokens: Tensor
    held_out: int
    work: Path
    dtype: torch.dtype
    device: torch.device
    seed: int
    config: TrainingConfig
    progress: ProgressCallback
    move_indices: float = 0.0
    _targets: WeightFiles = field(init=False)

    def run(self) -> tuple[FinetuneReport, dict[str, Tensor]]:
        """Trains, and returns the tensors of the best state by name; none where training brought nothing.

        Raises:
            CalibrationError: there are too few sequences to train on some and judge by others.
            VPTQError: the quantized model's predictions are not finite.
        """
        began = time.monotonic()
        sequences = len(self.tokens) - self.held_out
        needed = 2 if self.move_indices else 1
        if sequences < needed or self.held_out < 1:
            raise CalibrationError(
                f"finetuning needs text to train on and text to judge by, but there are only {len(self.tokens)} "
                "sequences; give a longer --calibration text, or a smaller --seqlen"
            )
        self._make_targets()
        self.progress(ProgressEvent("loading the quantized model"))
        student = Student(self.folder, self.device, self.skeleton)
        steps = max(1, sequences * self.config.epochs // self.config.batch)
        turns = MoveTurns(student, self.move_indices, min(steps, self.config.checks)) if self.move_indices else None
        trainer = Trainer(student.trained(), self.dtype, self.config, steps, turns.indices() if turns else {})
        trainer.restore(self.work / "training")
        self._train(student, trainer, turns)
        losses = [loss for _, loss in trainer.history]
        best = trainer.best if min(losses) < losses[0] else {}
        trained = sum(p.numel() for p in trainer.parameters.values())
        report = FinetuneReport(
            losses[0], min(losses), trainer.step, trainer.history, sequences, self.held_out, trained,
            self._moved(student, best) if turns else 0, time.monotonic() - began,
        )  # fmt: skip
        return report, best

    def _train(self, student: Student, trainer: Trainer, turns: MoveTurns | None) -> None:
        order = self._order(trainer.steps * self.config.batch)
        if not trainer.history and not math.isfinite(self._check(student, trainer)):
            raise VPTQError(f"{self.folder}: the quantized model's predictions are not finite; it cannot be finetuned")
        trainer.config = replace(self.config, rate=self.config.rate * rate_share(trainer.history[0][1]))
        if turns:
            turns.begin(len(trainer.history) - 1)
        while not trainer.done:
            at = trainer.step * self.config.batch
            batch = order[at : at + self.config.batch]
            loss = sum(self._divergence(student, i, gradients=True) for i in batch) / len(batch)
            if not math.isfinite(loss):
                line = f"step {trainer.step + 1}: the divergence is not finite; finetuning ends here"
                self.progress(ProgressEvent(STAGE, trainer.step, trainer.steps, message=line))
                return
            trainer.advance()
            self.progress(ProgressEvent(STAGE, trainer.step, trainer.steps, layer=f"KL {loss:.4f}", loss=loss))
            if trainer.check_is_due():
                if turns:
                    self._end_turn(student, trainer, turns)
                self._check(student, trainer)

    def _end_turn(self, student: Student, trainer: Trainer, turns: MoveTurns) -> None:
        """Moves indices, judged by the sequences that come next, and begins the next turn."""
        turn, began, batch = len(trainer.history) - 1, trainer.history[-1][0], self.config.batch
        order = self._order(trainer.steps * batch + len(self.tokens))  # there are some behind the last step as well
        seen = order[began * batch : trainer.step * batch]
        judges = [i for i in dict.fromkeys(order[trainer.step * batch :]) if i not in seen][:JUDGES]
        if judges:
            came = turns.end(turn, len(seen), lambda: sum(self._divergence(student, i) for i in judges) / len(judges))
            line = f"step {trainer.step}: {came}"
            self.progress(ProgressEvent(STAGE, trainer.step, trainer.steps, message=line))
        turns.begin(turn + 1)

    def _moved(self, student: Student, best: Mapping[str, Tensor]) -> int:
        """How many vectors have other indices in `best` than in the folder."""
        stored, moved = Checkpoint.open(self.folder), 0
        for path, layer in (pair for block in student.blocks for pair in block.items() if best):
            tensors = {name: best.get(f"{path}.{name}", p.detach().cpu()) for name, p in layer.named_parameters()}
            kept = QuantizedWeight.from_tensors(layer.config, tensors)
            moved += differing(stored.load_layer(path), kept)
        return moved

    def _check(self, student: Student, trainer: Trainer) -> float:
        held = range(len(self.tokens) - self.held_out, len(self.tokens))
        loss = trainer.check(lambda: sum(self._divergence(student, i) for i in held) / self.held_out)
        trainer.save(self.work / "training")
        line = f"step {trainer.step}: KL on held-out text {loss:.5f}"
        self.progress(ProgressEvent(STAGE, trainer.step, trainer.steps, message=line, loss=loss))
        return loss

    def _divergence(self, student: Student, number: int, *, gradients: bool = False) -> float:
        targets = self._targets.load(_name(number)).to(self.device)
        return student.divergence(self.tokens[number : number + 1], targets[None], gradients=gradients)

    def _order(self, wanted: int) -> list[int]:
        """Sequence numbers, every one once before any comes again."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        while len(order) < wanted:
            order += torch.randperm(len(self.tokens) - self.held_out, generator=generator).tolist()
        return order

    def _make_targets(self) -> None:
        """The original's last hidden states of every sequence, stored in the dtype of the computation."""
        folder = self.work / "targets"
        if not folder.is_dir():
            with staged_folder(folder) as staging:
                save_tensors(staging, self._last_states(), TARGET_SHARD_BYTES)
        self._targets = WeightFiles(folder)

    def _last_states(self) -> Iterator[tuple[str, Tensor]]:
        dtype = compute_dtype(self.device, self.dtype)
        activations = Activations(self.skeleton, self.tokens, dtype, quick=True)
        activations.run_model("running the original", self.progress)
        batches = self.skeleton.last_states(activations.batches, dtype)
        states = (sequence for batch in batches for sequence in batch.cpu())
        return ((_name(number), sequence.contiguous()) for number, sequence in enumerate(states))


def held_out_for(sequences: int) -> int:
    """How many more sequences only judge, beside so many to train on."""
    return max(2, sequences // 16)


def _name(number: int) -> str:
    return f"sequence {number}"
