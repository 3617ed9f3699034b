"""How much every token matters to every linear layer: H = E[s_t x_t x_t^T] in place of E[x_t x_t^T].

A layer's own output error counts every token alike, but the loss of the model does not. To second order an error dz_t
of a layer's output changes the loss by dz_t^T F_t dz_t / 2 with the Fisher information F_t, whose diagonal is the
square of the loss's gradient by that output. With one weight a token, s_t = mean over outputs k of (dl/dz_tk)^2, the
layer's problem keeps its shape (GuidedQuant, arXiv 2505.07004, with one group). One forward and one backward pass of
the original over the calibration text give all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vptq.progress import ProgressCallback, ProgressEvent
from vptq.quantize.head import logits_of, loss_in_slices
from vptq.quantize.skeleton import find_blocks, linears_of, recompute

LARGEST_WEIGHT = 100.0
"""A token weighs at most so many times the mean: single tokens with huge gradients would be the whole Hessian."""


def token_weights(model: Any, tokens: Tensor, progress: ProgressCallback) -> dict[str, Tensor]:
    """The weights of all calibration tokens.

    Args:
        model: the original causal language model, all of it in memory.
        tokens: [sequences, seqlen].
        progress: told about every sequence.

    Returns:
        For each linear layer in a decoder block, by module path, [sequences, seqlen] float32: the sum over its outputs
        of the squared gradient. Layers that do not see every token once (experts) are missing.
    """
    name, blocks = find_blocks(model)
    linears = {f"{name}.{i}.{path}": linear for i, b in enumerate(blocks) for path, linear in linears_of(b).items()}
    weights = {path: torch.full(tokens.shape, -1.0) for path in linears}
    with _frozen(model), _checkpointed(blocks), _squared_gradients(linears) as squared:
        progress(ProgressEvent("weighing tokens", 0, len(tokens)))
        for number, sequence in enumerate(tokens):
            _backward(model, sequence[None].to(model.device))
            for path, seen in squared.items():
                if len(seen) == 1 and seen[0].numel() == tokens.shape[1]:
                    weights[path][number] = seen[0].flatten().cpu()
                seen.clear()
            progress(ProgressEvent("weighing tokens", number + 1, len(tokens)))
    return {path: weight for path, weight in weights.items() if bool((weight >= 0).all())}


def group_weights(weights: Mapping[str, Tensor], paths: Sequence[str]) -> Tensor | None:
    """The weights of tokens for layers that share an input: mean 1, none above `LARGEST_WEIGHT`; None where unknown."""
    if not all(path in weights for path in paths):
        return None
    total = torch.stack([weights[path] for path in paths]).sum(0)
    mean = total.mean()
    if not bool(mean > 0):
        return None
    capped = (total / mean).clamp(max=LARGEST_WEIGHT)
    return capped / capped.mean()


def _backward(model: Any, tokens: Tensor) -> None:
    """The gradient of the text's negative log likelihood by everything behind the embeddings."""
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    with torch.enable_grad():
        hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
    targets = tokens[:, 1:]

    def loss_at(piece: Tensor, part: slice) -> Tensor:
        logits = logits_of(model, piece)[0, : targets.shape[1] - part.start].float()
        return functional.cross_entropy(logits, targets[0, part], reduction="sum")

    loss_in_slices(hidden, loss_at, gradients=True)


@contextmanager
def _squared_gradients(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, list[Tensor]]]:
    """While this is open, a backward pass collects the squared gradients of each layer's outputs, a sum a token."""
    seen: dict[str, list[Tensor]] = {path: [] for path in linears}

    def collect(path: str, grad: Tensor) -> None:
        seen[path].append(grad.float().square().sum(-1))

    def watch(path: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(collect, path))  # type: ignore[no-untyped-call]

    hooks = [linear.register_forward_hook(partial(watch, path)) for path, linear in linears.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for its gradient, and nothing is dropped; afterwards the model is as it was."""
    training, wanted = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_()


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks keep their inputs only and run again when their gradients are wanted."""
    for block in blocks:
        recompute(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
