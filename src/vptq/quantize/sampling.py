"""Text of a model's own, for calibrating it without any data.

Sampling is one long decode, so it is arranged for throughput: as many sequences at once as a fixed memory budget for
their keys and values allows (fixed, not what happens to be free, because the batch size decides which random number
goes to which sequence), in a cache that is allocated once instead of being copied for every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from vptq.errors import CalibrationError
from vptq.kv_cache import make_cache
from vptq.progress import ProgressCallback, ProgressEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_BYTES = 2 * 2**30


@torch.inference_mode()
def sample_sequences(
    model: PreTrainedModel,
    start_token: int,
    sequences: int,
    seqlen: int,
    seed: int,
    cache_bytes: int = CACHE_BYTES,
    progress: ProgressCallback | None = None,
) -> torch.Tensor:
    """Let a model write, at temperature 1, without stopping at end-of-text tokens.

    A sequence that reaches an end-of-text token goes on with whatever the model holds likely after it, which is how
    documents follow each other in training data.

    Args:
        model: A causal language model, in eval mode.
        start_token: First token of every sequence.
        sequences: How many to sample.
        seqlen: Their length, `start_token` included.
        seed: Of the generator; the same seed, machine and thread count give the same tokens.
        cache_bytes: Memory budget for the keys and values of the sequences sampled at once.
        progress: Told after every 16th token of a batch; `done` and `total` count tokens.

    Returns:
        Token ids [sequences, seqlen], int64, on the CPU.

    Raises:
        CalibrationError: The model's distribution is not finite.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    tokens = torch.empty(sequences, seqlen, dtype=torch.int64)
    tokens[:, 0] = start_token
    batch = max(1, cache_bytes // _cache_bytes_per_sequence(model, seqlen))
    done = 0
    for rows in tokens.split(batch):  # type: ignore[no-untyped-call]
        for position in _continue(model, rows, generator):
            # Every token would be more events than there is to see.
            if progress is not None and (position % 16 == 0 or position == seqlen - 1):
                written = done + rows.shape[0] * (position + 1)
                progress(ProgressEvent("sampling calibration text", written, tokens.numel()))
        done += rows.numel()
    return tokens


def _continue(model: PreTrainedModel, rows: torch.Tensor, generator: torch.Generator) -> Iterator[int]:
    """Fill `rows` [batch, seqlen] from their first column on, yielding each position when it is filled."""
    seqlen = rows.shape[1]
    step = rows[:, :1].to(model.device)
    cache = make_cache(model, seqlen)
    for position in range(1, seqlen):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        step = _draw(output.logits[:, -1], generator)
        rows[:, position] = step[:, 0]
        yield position


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    probabilities = torch.softmax(logits.float(), dim=-1)
    # One NaN among the probabilities would make multinomial fail with a message about its own argument.
    if not bool(torch.isfinite(probabilities.sum())):
        raise CalibrationError(
            f"the model's logits are not finite (dtype {logits.dtype}), so it cannot sample its own calibration text; "
            "check the model, try dtype bfloat16, or give a calibration text"
        )
    return torch.multinomial(probabilities, 1, generator=generator)


def _cache_bytes_per_sequence(model: PreTrainedModel, seqlen: int) -> int:
    """Keys and values of one sequence, over-estimated where a config does not say (the budget is rough anyway)."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    itemsize: int = model.dtype.itemsize
    return int(2 * config.num_hidden_layers * key_heads * head_dim * seqlen * itemsize)
