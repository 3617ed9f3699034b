"""Layers that read the same input, run as one.

A block multiplies one vector with its q, k and v projections, and another with gate and up. A GPU generating a token is
done with such a layer in a few microseconds, as long as its launch takes. So the layers of such a group know of each
other: the first one called computes for all, in one launch (`vptq::linear_group`), and the others take what is theirs.

Nothing of the model is replaced. Modules, parameters and their names stay, and with them saving, loading, adapters and
whoever calls a layer by itself: what was computed ahead belongs to one input tensor, and another one gets a new answer.
The calls of a CPU take milliseconds each, so there layers stay by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vptq.linear import VQuantLinear
from vptq.ops.triton_paths import GROUP_TOKENS

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that read one input, by the names that transformers gives them."""

_linear_group = torch.ops.vptq.linear_group.default


def fuse_shared_inputs(model: nn.Module) -> None:
    """Lets the quantized layers of a model that read the same input run as one on a GPU.

    Layers are found by `TOGETHER`; they differ in nothing but their rows and bias. Safe to call again.

    Args:
        model: Changed in place; gradients and calls of many tokens go the usual way.
    """
    for module in model.modules():
        for names in TOGETHER:
            found = [child for name in names if isinstance(child := getattr(module, name, None), VQuantLinear)]
            for alike in _alike(found):
                SharedInput(alike)


def _alike(layers: Sequence[VQuantLinear]) -> Iterator[list[VQuantLinear]]:
    """Those of the layers that one launch can serve, if there are several."""
    forms: dict[object, list[VQuantLinear]] = {}
    for layer in layers:
        form = dataclasses.replace(layer.config, out_features=1, bias=False)
        forms.setdefault((form, layer.dtype), []).append(layer)
    yield from (some for some in forms.values() if len(some) > 1)


class SharedInput:
    """Layers that read the same input.

    Args:
        layers: They get to know of each other.
    """

    def __init__(self, layers: Sequence[VQuantLinear]) -> None:
        self._layers = tuple(layers)
        # An input and what was computed for it but not taken yet. Replaced as a whole: threads may run one model.
        self._ahead: tuple[Tensor, dict[VQuantLinear, Tensor]] | None = None
        for layer in layers:
            layer.shared_input = self

    def output(self, layer: VQuantLinear, x: Tensor) -> Tensor | None:
        """A layer's output, without gradients; None where it has to compute by itself.

        Args:
            layer: One of the layers.
            x: Its input, of the right width and dtype.
        """
        ahead = self._ahead
        if ahead is None:
            return self._compute(x).pop(layer) if self._serves(layer, x) else None
        if ahead[0] is not x or layer not in ahead[1]:
            self._dissolve()
            return None
        y = ahead[1].pop(layer)
        if not ahead[1]:
            self._ahead = None
        return y

    def _serves(self, layer: VQuantLinear, x: Tensor) -> bool:
        """Whether one launch does it: also not for a copy of a layer, or layers that are offloaded or apart."""
        return (
            _pays(x.device)
            and 1 <= x.numel() // layer.in_features <= GROUP_TOKENS
            and layer in self._layers
            and all(other._stored()[1].device == x.device for other in self._layers)  # type: ignore[union-attr]
        )

    def _compute(self, x: Tensor) -> dict[VQuantLinear, Tensor]:
        """The layers' outputs, kept for those who come for theirs."""
        tensors = [tensor for layer in self._layers for tensor in (*layer._stored(), layer._parameters["bias"])]
        flat = _linear_group(x, tensors, [size for layer in self._layers for size in layer._sizes])
        tokens, first, outputs = x.numel() // self._layers[0].in_features, 0, {}
        for layer in self._layers:
            last = first + tokens * layer.out_features
            outputs[layer] = flat[first:last].view(*x.shape[:-1], layer.out_features)
            first = last
        self._ahead = x, outputs
        return outputs

    def _dissolve(self) -> None:
        """For layers whose input is not shared after all: another came before all had taken what was theirs."""
        self._ahead = None
        for layer in self._layers:
            layer.shared_input = None


def _pays(device: torch.device) -> bool:
    """Whether a call costs enough beside what it does."""
    return device.type != "cpu"
