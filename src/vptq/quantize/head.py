"""The part of a causal language model behind its last hidden states, run on its own: a slice of positions at a time.

Logits over a large vocabulary are the largest tensors around, so losses are taken slice by slice. The model's own code
runs, with its decoder replaced by the states at hand: scaling and capping of logits are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

POSITIONS_AT_ONCE = 128
"""With 256 the logits of a usual vocabulary are tensors of more than 32 MiB, which the C library takes from the system
anew each time: 5 to 15% slower on a CPU, with gradients and without."""


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits [batch, positions, vocabulary] of last hidden states [batch, positions, width]."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder = model.get_decoder()
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[arg-type]
    try:
        logits: Tensor = model(input_ids=hidden.new_zeros(hidden.shape[:2], dtype=torch.int64)).logits
    finally:
        del decoder.forward
    return logits


def divergence_of(original: Tensor, other: Tensor) -> Tensor:
    """KL(original || other) of two models' logits [..., vocabulary], summed over all positions, in nats; a scalar."""
    log_p, log_q = (functional.log_softmax(logits.float(), -1) for logits in (original, other))
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def positions(count: int) -> Iterator[slice]:
    """Slices of `POSITIONS_AT_ONCE` that cover `count` positions."""
    return (slice(first, min(first + POSITIONS_AT_ONCE, count)) for first in range(0, count, POSITIONS_AT_ONCE))


def loss_in_slices(hidden: Tensor, loss_at: Callable[[Tensor, slice], Tensor], *, gradients: bool) -> float:
    """The sum of `loss_at(hidden[:, part], part)` over all slices of positions, in float64.

    Args:
        hidden: [batch, positions, width], with a way back where gradients are wanted.
        loss_at: a scalar for some positions.
        gradients: send the sum's gradient back through `hidden`.
    """
    pull = torch.empty_like(hidden)
    total = torch.zeros((), dtype=torch.float64)
    for part in positions(hidden.shape[1]):
        piece = hidden[:, part].detach().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            loss = loss_at(piece, part)
        total += float(loss.detach())
        if gradients:
            (pull[:, part],) = torch.autograd.grad(loss, piece)
    if gradients:
        hidden.backward(pull)  # type: ignore[no-untyped-call]
    return float(total)
