"""Perplexity, and how far a model's predictions are from the original's, in one pass over the same windows.

Perplexity alone hides damage: a quantized model can be wrong in new places and right in others at the same average.
The Kullback-Leibler divergence KL(original || model) of the next-token distributions cannot, and needs no ground truth;
so when the original is at hand both are measured on the logits of the same forward passes.

A window's predictions are its first seqlen - 1 positions, each seeing what comes before it in the window. Log-softmax
is taken in float32 whatever the model's dtype, a slice of positions at a time, because logits over a large vocabulary
are the largest tensors around; sums are float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from vptq.errors import ConfigError, VPTQError
from vptq.evaluate.remembered import Original, logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS_AT_ONCE = 128
"""Whose logits are compared at once; see `quantize/head.py`."""


@dataclass(frozen=True)
class Scores:
    """Figures of one model over some windows.

    Attributes:
        perplexity: exp of the mean over windows of the mean negative log likelihood of a window's next tokens.
        reference_perplexity: The same of the original model; None without one.
        kl_divergence: KL(original || model) per predicted token, in nats; None without an original.
        same_top_token: Share of positions where both hold the same token likeliest; None without an original.
    """

    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    same_top_token: float | None = None


def score_windows(
    model: PreTrainedModel,
    windows: torch.Tensor,
    reference: PreTrainedModel | None = None,
    progress: Callable[[int, int], None] | None = None,
    remembered: Path | None = None,
) -> Scores:
    """Measure a model, and its distance to the original if there is one.

    Args:
        model: A causal language model, in eval mode.
        windows: Token ids [windows, seqlen], integers, seqlen >= 2.
        reference: The original model, over the same vocabulary.
        progress: Called with (windows done, windows in total).
        remembered: File for the original's predictions, see `Original`.

    Raises:
        ConfigError: There is no window, a token is outside the vocabulary, or the two vocabularies differ.
        VPTQError: The model's logits are not finite.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ConfigError(f"token windows have shape {list(windows.shape)}; at least one window of 2 tokens is needed")
    _check_vocabulary(model, windows, reference)
    totals = torch.zeros(4, dtype=torch.float64)
    original = None if reference is None else Original(reference, windows, remembered)
    for done, window in enumerate(windows, start=1):
        sums = _score_window(model, window, None if original is None else original.logits(done - 1))
        if not math.isfinite(sums[0]):
            raise VPTQError(
                f"the model's logits are not finite in window {done} of {len(windows)} (dtype {model.dtype}); "
                "try dtype bfloat16 or float32"
            )
        totals += sums
        if progress is not None:
            progress(done, len(windows))
    if original is not None and (why := original.keep()):
        logging.getLogger("vptq").warning(why)
    # Windows are equally long, so the mean over windows of means within them is the mean over all predictions.
    nll, reference_nll, divergence, same_top = (totals / (windows.shape[0] * (windows.shape[1] - 1))).tolist()
    if reference is None:
        return Scores(math.exp(nll))
    return Scores(math.exp(nll), math.exp(reference_nll), divergence, same_top)


@torch.inference_mode()
def _score_window(model: PreTrainedModel, window: torch.Tensor, reference_logits: torch.Tensor | None) -> torch.Tensor:
    """Sums over one window's predictions, float64 [4]: NLL, the original's NLL, KL, same likeliest token."""
    logits = logits_of(model, window)
    reference_logits = None if reference_logits is None else reference_logits.to(logits.device)
    targets = window[1:].to(logits.device)
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    for first in range(0, len(targets), POSITIONS_AT_ONCE):
        part = slice(first, first + POSITIONS_AT_ONCE)
        log_p = functional.log_softmax(logits[part].float(), dim=-1)
        sums[0] += functional.nll_loss(log_p, targets[part], reduction="sum")
        if reference_logits is None:
            continue
        reference_log_p = functional.log_softmax(reference_logits[part].float(), dim=-1)
        sums[1] += functional.nll_loss(reference_log_p, targets[part], reduction="sum")
        sums[2] += functional.kl_div(log_p, reference_log_p, reduction="sum", log_target=True)
        sums[3] += (log_p.argmax(-1) == reference_log_p.argmax(-1)).sum()
    return sums.cpu()


def _check_vocabulary(model: PreTrainedModel, windows: torch.Tensor, reference: PreTrainedModel | None) -> None:
    size = model.config.get_text_config().vocab_size
    if int(windows.max()) >= size:
        raise ConfigError(
            f"the text has token {int(windows.max())}, but the model's vocabulary ends at {size - 1}; "
            "does the tokenizer belong to this model?"
        )
    if reference is not None and (reference_size := reference.config.get_text_config().vocab_size) != size:
        raise ConfigError(
            f"the reference model has a vocabulary of {reference_size}, the model one of {size}; "
            "divergence is defined between models over the same vocabulary"
        )
