"""The calibration text on its way through both models at once, and the moments of a layer's inputs in either.

The original runs over all of the text, once for every block; the quantized model, which has to run up to the inputs of
every group of layers, only over the beginning of each sequence. A causal model computes the same for a beginning
whatever follows, so the two can be compared there, and beginnings of all sequences say more than a few whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vptq.quantize.activations import Activations, InputGroup
from vptq.quantize.hessian import HessianAccumulator, PairedAccumulator
from vptq.quantize.skeleton import Skeleton

PAIRED_TOKENS = 512
"""At the beginning of every sequence. docs/log.md has what other choices gave and cost."""


@dataclass
class Kept:
    """A layer's inputs at the beginnings of all sequences.

    One tensor from the start: hundreds of pieces, made between the tensors of a pass, would leave as many gaps.

    Attributes:
        rows: [sequences, length, n], as far as they have come.
        count: sequences that have come; more than there are where the layer is called more than once.
    """

    rows: Tensor
    count: int = 0

    def add(self, inputs: Tensor) -> None:
        """The next sequences' [batch, length, n]."""
        stop = self.count + len(inputs)
        if stop <= len(self.rows):
            self.rows[self.count : stop].copy_(inputs)
        self.count = stop


@dataclass
class PairedActivations:
    """Hidden states of both models at the input of the next block.

    Attributes:
        original: those of the original, for all tokens.
        quantized: those of the quantized model, for the beginnings.
    """

    original: Activations
    quantized: Activations
    _hessians: dict[str, HessianAccumulator] = field(default_factory=dict)
    _inputs: dict[str, Kept] = field(default_factory=dict)

    @classmethod
    def start(cls, skeleton: Skeleton, tokens: Tensor, dtype: torch.dtype) -> PairedActivations:
        """Both at the input of the first block, where they agree."""
        beginnings = tokens[:, :PAIRED_TOKENS]
        return cls(
            Activations(skeleton, tokens, dtype, quick=True), Activations(skeleton, beginnings, dtype, quick=True)
        )

    def run_original(self, index: int, groups: Sequence[InputGroup], weights: Sequence[Tensor | None]) -> None:
        """The original runs through block `index`, which is still its own, and its inputs to `groups` are noted.

        Args:
            index: the block; its weights are loaded.
            groups: of layers.
            weights: for each group, what every token counts [sequences, seqlen], or None.
        """
        self._inputs = {}
        sequences, length = sum(map(len, self.original.batches)), self.quantized.batches[0].shape[1]

        def keep(name: str, inputs: Tensor) -> None:
            if inputs.dim() == 3:  # experts get tokens without their places
                if name not in self._inputs:
                    self._inputs[name] = Kept(inputs.new_empty(sequences, length, inputs.shape[2], device="cpu"))
                self._inputs[name].add(inputs[:, :length])

        seen = self.original.hessians(index, groups, weights=weights, advance=True, keep=keep)
        self._hessians = {group.names[0]: hessian for group, hessian in zip(groups, seen, strict=True)}

    def hessian(self, group: InputGroup) -> HessianAccumulator:
        """E[x x^T] of the original, after `run_original`."""
        return self._hessians[group.names[0]]

    def moments(self, index: int, group: InputGroup, weights: Tensor | None) -> PairedAccumulator:
        """Runs the quantized model up to the inputs of `group`, where it meets what the original had.

        Args:
            index: the block; the layers before the group are quantized.
            group: of layers.
            weights: what every token counts [sequences, seqlen], or None.
        """
        name, batches = group.names[0], self.quantized.batches
        paired = PairedAccumulator(self.hessian(group))
        counts = self.quantized.split(None if weights is None else weights[:, : batches[0].shape[1]])
        originals = self._originals(name, [len(batch) for batch in batches])
        for x, y, count in zip(originals, self.quantized.inputs_of(name, index), counts, strict=True):
            if y is not None:  # an expert may get other tokens than it did, or none
                paired.add(y if x is None or x.shape != y.shape else x.to(y), y, count)
        return paired

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The hidden states themselves on the beginnings: of the original and of the quantized model."""
        length = self.quantized.batches[0].shape[1]
        originals = torch.cat([batch[:, :length] for batch in self.original.batches])
        return zip(originals.split([len(b) for b in self.quantized.batches]), self.quantized.batches, strict=True)  # type: ignore[no-untyped-call]

    def _originals(self, name: str, sizes: Sequence[int]) -> Sequence[Tensor | None]:
        """What the original gave the layer, for every batch of the quantized model."""
        kept = self._inputs.pop(name, None)  # they are a large part of all memory in use
        if kept is None or kept.count != sum(sizes):
            return [None] * len(sizes)
        parts: list[Tensor] = list(kept.rows.split(list(sizes)))  # type: ignore[no-untyped-call]
        return parts
