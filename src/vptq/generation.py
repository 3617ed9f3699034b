"""One answer of a model, as text that comes in pieces: what terminal chat, prompts, server and web chat have in common.

transformers' `generate` does the work. Around it stand four things that it does not do, or not well enough to show
somebody: text piece by piece without half a character or a lost space, stop strings that never show in part, an answer
that can be given up between two tokens from another thread, and keys and values kept from one answer to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vptq.errors import ConfigError
from vptq.kv_cache import is_plain, make_cache
from vptq.sampling import Sampling
from vptq.streaming import StopStrings, TextStream, TokenTimes

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# The first two are OpenAI's: the model ended the answer, or a stop string did; or it was cut off.
FinishReason = Literal["stop", "length", "given up"]

# What people are told where there is nothing else to show.
WORDLESS = "The model ended its answer without a word"


@dataclass(frozen=True)
class Finish:
    """How an answer ended, and how fast it came.

    Attributes:
        reason: "stop", "length" (of what was allowed, or of the context), or "given up" because the caller said so.
        tokens: Tokens that were generated, one that ends the answer included.
        prompt_tokens: Tokens of the prompt.
        reused_tokens: Of those, how many were in the cache from the answer before.
        first_token_seconds: Time until the first token, which is the prompt's.
        tokens_per_second: Of the tokens after the first; 0 where there are none.
    """

    reason: FinishReason
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    first_token_seconds: float
    tokens_per_second: float

    @property
    def length(self) -> str:
        """How many tokens, for people to read."""
        return f"{self.tokens} token{'' if self.tokens == 1 else 's'}"


class PrefixCache:
    """Keys and values of the last prompt and answer, for a next prompt that begins alike: the same chat, a turn later.

    Only what can be cut at any token is kept.
    """

    def __init__(self) -> None:
        self._kept: tuple[DynamicCache, Tensor] | None = None

    def take(self, prompt: Tensor) -> tuple[DynamicCache | None, int]:
        """Hand over what a prompt [tokens] has in common with the last one, and how many tokens that are.

        It is gone from here then, so that an answer which fails leaves nothing half done behind.
        """
        (cache, ids), self._kept = self._kept or (None, prompt[:0]), None
        length = min(len(ids), len(prompt) - 1)  # one token has to run, to predict the next
        differing = (ids[:length] != prompt[:length]).nonzero()
        common = int(differing[0]) if len(differing) else length
        if cache is None or common == 0:
            return None, 0
        if len(ids) > common:
            cache.crop(common - len(ids))
        return cache, common

    def keep(self, output: Any) -> None:
        """Keep what generate() leaves."""
        cache = output.past_key_values
        if is_plain(cache):
            self._kept = cache, output.sequences[0, : cache.get_seq_length()].cpu()


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """A conversation in the words of the model's chat template: token ids [1, tokens], int64.

    Some models' templates know no system role and raise on it; those get the system message in front of the first
    question.

    Raises:
        ConfigError: The tokenizer has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; ask for a completion of plain text instead")
    try:
        return _templated(tokenizer, messages)
    except Exception as error:  # a template raises whatever its author chose
        if len(messages) > 1 and messages[0]["role"] == "system":
            system, first, *rest = messages
            merged = {**first, "content": f"{system['content']}\n\n{first['content']}"}
            return chat_prompt(tokenizer, [merged, *rest])
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from error


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """A text to be continued: token ids [1, tokens], int64, with the special tokens the model expects before it.

    Raises:
        ConfigError: No token comes of it.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if ids.numel() == 0:
        raise ConfigError("the prompt is empty, and this model needs a token to begin with; give some text")
    return ids


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens of prompt and answer together; None where neither model nor tokenizer states a limit."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = stated or tokenizer.model_max_length
    return int(limit) if limit < 1e9 else None  # tokenizers say 1e30 for "no limit"


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    sampling: Sampling,
    on_text: Callable[[str], None],
    is_stopped: Callable[[], bool] = lambda: False,
    on_token: Callable[[], None] = lambda: None,
    stops: Iterable[str] = (),
    goes_on: bool = False,
    cache: PrefixCache | None = None,
) -> Finish:
    """Answer a prompt.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        prompt: Token ids [1, tokens].
        sampling: How tokens are chosen, and how many at most; the context's end is an end too.
        on_text: Called with each piece of the answer as soon as it is certain to be part of it.
        is_stopped: Asked after every token whether to give up.
        on_token: Called after every token.
        stops: Texts that end the answer; they are not part of it.
        goes_on: Whether the answer continues the prompt's text, and so begins with the space that belongs between.
        cache: Of the answer before, to which this one's is added; None to run all of the prompt and keep nothing.

    Returns:
        How it ended. Equal seeds give equal answers if no other thread draws random numbers meanwhile.

    Raises:
        ConfigError: The prompt fills the context.
    """
    context, length = context_length(model, tokenizer), prompt.shape[1]
    if context is not None and length >= context:
        raise ConfigError(
            f"the question is {length} tokens long with all that goes before it; the model's context holds {context}; "
            "ask something shorter, or begin a new conversation"
        )
    stream = TextStream(tokenizer, StopStrings(stops), on_text, prompt[0].tolist() if goes_on else ())
    kept, reused = (None, 0) if cache is None else cache.take(prompt[0].cpu())
    if kept is None:
        kept = make_cache(model)
    prompt = prompt.to(model.device)
    # Models without a padding token make generate() warn; with one sequence at a time the choice has no effect.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    # A criterion sees each token before it is decided whether to go on; what transformers calls a streamer cannot stop.
    def is_over(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        on_token()
        stream.take(int(tokens[0, -1]))
        return torch.full((1,), stream.stops.found or is_stopped(), device=tokens.device)

    generator: Any = model  # nn.Module.__getattr__ hides the mixin's method from the type checker
    with _seeded(model, sampling.seed):
        times = TokenTimes()
        output = generator.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=times,
            stopping_criteria=[is_over],
            pad_token_id=pad,
            return_dict_in_generate=True,
            max_new_tokens=min(sampling.max_new_tokens, context - length if context else sampling.max_new_tokens),
            **sampling.generate_arguments(),
            **({} if kept is None else {"past_key_values": kept}),
        )
    stream.end()
    if cache is not None:
        cache.keep(output)
    reason: FinishReason = "given up" if is_stopped() else "length"
    if stream.stops.found or _ends(model, int(output.sequences[0, -1])):
        reason = "stop"
    tokens = output.sequences.shape[1] - length
    return Finish(reason, tokens, length, reused, times.first_token_seconds, times.tokens_per_second)


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Tensor:
    conversation = [dict(message) for message in messages]
    encoded: Any = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: Tensor = encoded["input_ids"]
    return ids


@contextmanager
def _seeded(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """Random numbers from a seed for a while; everybody else's go on as if nothing had been."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _ends(model: PreTrainedModel, token: int) -> bool:
    """Whether a token is one that ends an answer."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    return token in (ends if isinstance(ends, list) else [ends])
