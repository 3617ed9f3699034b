"""The token sequences a model is calibrated on.

Either real text, or text of the model's own. "self" is the default because it needs nothing but the model: each
sequence starts at the BOS token and every next token is drawn from the model's own distribution at temperature 1, so
the inputs the linear layers see are distributed as they are when the model talks. Real text close to what the model
will be used for is better (docs/algorithm.md says by how much).

Sampling is one long decode, so it is arranged for throughput: as many sequences at once as a fixed memory budget for
their keys and values allows (fixed, not what happens to be free, because the batch size decides which random number
goes to which sequence), in a cache that is allocated once instead of being copied for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vptq.errors import CalibrationError, ConfigError
from vptq.quantize.report import ProgressCallback, ProgressEvent
from vptq.text import token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"
CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Attributes:
        tokens: Token ids [sequences, seqlen], int64, on the CPU.
        description: One phrase for reports and model cards.
        warning: What is wrong with it, if anything.
    """

    tokens: torch.Tensor
    description: str
    warning: str | None = None


def load_calibration(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    sequences: int,
    seqlen: int,
    seed: int,
    model_loader: Callable[[], PreTrainedModel],
    progress: ProgressCallback | None = None,
) -> Calibration:
    """Make the calibration sequences.

    Args:
        source: "self", a local text file, `wikitext2`, `c4`, or a hub data set `NAME[:CONFIG][@SPLIT]`.
        tokenizer: The model's; may be None for "self" when the model's config names its BOS token.
        sequences: How many sequences to make; fewer, with a warning, when the text is short.
        seqlen: Tokens per sequence.
        seed: Of the sampling. Text is always read from its beginning.
        model_loader: Gives the original model; called for "self" only, which drops it when done.
        progress: Told about every few steps of sampling.

    Raises:
        CalibrationError: The text is empty, or the model's distribution is not finite.
        ConfigError: There is no such text, a count is out of range, or the model has no token to start from.
    """
    if sequences < 1:
        raise ConfigError(f"sequences is {sequences}; at least 1 is needed")
    if seqlen < 2:
        raise ConfigError(f"seqlen is {seqlen}; at least 2 is needed")
    if str(source) == SELF:
        model = model_loader()
        start = _start_token(model, tokenizer)
        tokens = sample_sequences(model, start, sequences, seqlen, seed, progress=progress)
        return Calibration(tokens, f"{sequences} x {seqlen} tokens sampled from the model itself (seed {seed})")
    if tokenizer is None:
        raise ConfigError(f"calibration text {source} needs a tokenizer, and the model has none; use calibration=self")
    tokens = token_windows(source, tokenizer, seqlen, sequences, purpose="calibration")
    if tokens.shape[0] == 0:
        raise CalibrationError(f"calibration text {source} is empty; give a longer text, or use calibration=self")
    found, length = tokens.shape
    name = Path(source).name if Path(source).is_file() else source
    return Calibration(tokens, f"{found} x {length} tokens of {name}", _shortage(source, tokens, sequences, seqlen))


def _shortage(source: str | Path, tokens: torch.Tensor, sequences: int, seqlen: int) -> str | None:
    found, length = tokens.shape
    if length < seqlen:
        return f"calibration text {source} has only {length} tokens, less than one sequence of {seqlen}; using those"
    if found < sequences:
        return f"calibration text {source} fills only {found} of {sequences} sequences of {seqlen} tokens; using those"
    return None


def _start_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    candidates = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(model.config.get_text_config(), "bos_token_id", None),
        # Models without a BOS token were trained on documents that follow an end-of-text token.
        getattr(tokenizer, "eos_token_id", None),
    )
    for token in candidates:
        if isinstance(token, int):
            return token
    raise ConfigError("calibration=self needs a BOS token to start from, and the model has none; give a text file")


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
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = torch.empty(sequences, seqlen, dtype=torch.int64)
    batch = max(1, min(sequences, cache_bytes // _cache_bytes_per_sequence(model, seqlen)))
    for first in range(0, sequences, batch):
        rows = tokens[first : first + batch]
        rows[:, 0] = start_token
        step = torch.full((rows.shape[0], 1), start_token, device=device)
        cache = _new_cache(model, seqlen)
        for position in range(1, seqlen):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            step = _draw(output.logits[:, -1], generator)
            rows[:, position] = step[:, 0]
            if progress is not None and (position % 16 == 0 or position == seqlen - 1):
                done = first * seqlen + rows.shape[0] * (position + 1)
                progress(ProgressEvent("sampling calibration text", done, sequences * seqlen))
    return tokens


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


def _new_cache(model: PreTrainedModel, seqlen: int) -> Any:
    """An empty cache with room for `seqlen` tokens where the model uses the plain kind, else the model's own choice.

    transformers' dynamic layers concatenate: every token copies all keys and values so far. Its static ones attend to
    the whole allocated length. Preallocated storage of which the filled part is shown costs neither.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=model.config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [_preallocated_layer(seqlen) for _ in cache.layers]
    return cache


def _preallocated_layer(capacity: int) -> Any:
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]
        """A dynamic cache layer whose storage does not move."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.filled = 0
                self.key_storage = _with_length(key_states, capacity)
                self.value_storage = _with_length(value_states, capacity)
            end = self.filled + key_states.shape[-2]
            self.key_storage[..., self.filled : end, :] = key_states
            self.value_storage[..., self.filled : end, :] = value_states
            self.filled = end
            self.keys = self.key_storage[..., :end, :]
            self.values = self.value_storage[..., :end, :]
            return self.keys, self.values

    return PreallocatedLayer()


def _with_length(states: torch.Tensor, length: int) -> torch.Tensor:
    return states.new_empty(*states.shape[:-2], length, states.shape[-1])
