"""Indices that move while a model is finetuned: decoder blocks take turns, and moves that do harm are taken back.

A turn lasts from one check of the trainer to the next, so that nothing of an unfinished turn has to be stored: an
interrupted run begins it anew. Gradients of dense weights are summed up for the blocks whose turn it is and for no
others; with eight turns they take an eighth of the dense model, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.linear import VQuantLinear
from vptq.quantize.index_moves import Moves, best_of, move, propose, vectors_of
from vptq.quantize.student import Student
from vptq.weight import QuantizedWeight

INDICES = ("indices", "res_indices", "outlier_indices")

TRIES = (1, 4, 16)
"""Where the moves of a turn do harm together, the best quarter of them is tried, then the best sixteenth."""


@dataclass(frozen=True)
class Turn:
    """What came of one turn.

    Attributes:
        moved: vectors that took other centroids.
        before: the loss on text that this turn did not see.
        after: the same with them; `before` where none moved.
        expected: the same as the gradient has it.
    """

    moved: int
    before: float
    after: float
    expected: float

    def __str__(self) -> str:
        if not self.moved:
            return "no vector takes another centroid: none of the moves that were tried helps"
        falls = f"KL {self.before:.5f} to {self.after:.5f} ({self.expected:.5f} expected)"
        return f"{self.moved:,} vectors take other centroids: {falls}"


class MoveTurns:
    """The turns of one run.

    Attributes:
        gradients: of the dense weights whose turn it is, by path; float32, the sums over what the student was given.
    """

    def __init__(self, student: Student, share: float, turns: int) -> None:
        """Lets the quantized layers of `student` tell the gradients of their dense weights.

        Args:
            student: the model that is finetuned.
            share: of all vectors, how many may move in all turns together.
            turns: how many there will be.
        """
        self._blocks = [layers for layers in student.blocks if layers]
        self._parts = min(turns, len(self._blocks))
        vectors = sum(vectors_of(layer.config) for block in self._blocks for layer in block.values())
        self._limit = int(share * vectors / turns)
        self.gradients: dict[str, Tensor] = {}
        for layers in self._blocks:
            for path, layer in layers.items():
                self._listen(path, layer)

    def indices(self) -> dict[str, Tensor]:
        """The tensors that moves change in place, by name."""
        layers = [layer for block in self._blocks for layer in block.items()]
        found = {f"{path}.{name}": p.detach() for path, layer in layers for name, p in layer.named_parameters()}
        return {name: tensor for name, tensor in found.items() if name.rpartition(".")[2] in INDICES}

    def begin(self, turn: int) -> None:
        """Gradients of the blocks whose turn it is are summed up from now on."""
        self.gradients = {
            path: torch.zeros(layer.out_features, layer.in_features, device=layer.get_parameter("indices").device)
            for path, layer in self._layers(turn).items()
        }

    def end(self, turn: int, sequences: int, judge: Callable[[], float]) -> Turn:
        """Moves what the gradients ask for as far as that makes the loss fall, and forgets them.

        Args:
            turn: its number, as it was begun.
            sequences: how many have gone through the student since then.
            judge: the loss on others.
        """
        layers = self._layers(turn)
        proposals = {}
        for path, layer in layers.items():
            proposals[path] = propose(weight_of(layer), self.gradients.pop(path) / sequences, self._limit)
        before = judge()
        found = min(self._limit, sum(map(len, proposals.values())))
        for part in TRIES:
            chosen = {path: moves for path, moves in best_of(proposals, found // part).items() if len(moves)}
            undone = {path: _stored_indices(layers[path]) for path in chosen}
            for path, moves in chosen.items():
                _move(layers[path], moves)
            after = judge() if chosen else before
            if after < before:
                expected = before - sum(float(moves.gains.sum()) for moves in chosen.values())
                return Turn(sum(map(len, chosen.values())), before, after, expected)
            for path, stored in undone.items():
                _store_indices(layers[path], stored)
        return Turn(0, before, before, before)

    def _layers(self, turn: int) -> dict[str, VQuantLinear]:
        """The layers whose turn it is, by path."""
        blocks = self._blocks[turn % self._parts :: self._parts]
        return {path: layer for block in blocks for path, layer in block.items()}

    def _listen(self, path: str, layer: VQuantLinear) -> None:
        dequantize = layer.dequantize_with_gradient

        def dequantize_and_listen() -> Tensor:
            weight = dequantize()
            if path in self.gradients and weight.requires_grad:
                weight.register_hook(lambda gradient: self._add(path, gradient))  # type: ignore[no-untyped-call]
            return weight

        layer.dequantize_with_gradient = dequantize_and_listen  # type: ignore[method-assign]

    def _add(self, path: str, gradient: Tensor) -> None:
        self.gradients[path] += gradient


def weight_of(layer: VQuantLinear) -> QuantizedWeight:
    """What a layer holds, its indices unpacked; no part of it is the layer's own memory where it is an index."""
    return QuantizedWeight.from_tensors(layer.config, {name: p.detach() for name, p in layer.named_parameters()})


def _move(layer: VQuantLinear, moves: Moves) -> None:
    weight = weight_of(layer)
    move(weight, moves)
    stored = weight.to_tensors(layer.dtype)
    _store_indices(layer, {name: stored[name] for name in INDICES if name in stored})


def _stored_indices(layer: VQuantLinear) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in layer.named_parameters() if name in INDICES}


def _store_indices(layer: VQuantLinear, stored: Mapping[str, Tensor]) -> None:
    for name, indices in stored.items():
        layer.get_parameter(name).detach().copy_(indices)
