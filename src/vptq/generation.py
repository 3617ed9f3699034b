"""One answer of a model, as text that comes in pieces: what the server and the web chat have in common.

transformers' `generate` does the work. Around it stand three things that it does not do, or not well enough to show
somebody: text piece by piece without half a character or a lost space, stop strings that never show in part, and an
answer that can be given up between two tokens from another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vptq.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The first two are OpenAI's: the model ended the answer, or a stop string did; or it was cut off.
FinishReason = Literal["stop", "length", "given up"]
# What a decoder writes for bytes that are no whole character yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None leaves a setting to the model's own generation_config.json.

    Attributes:
        max_new_tokens: Most tokens of the answer.
        temperature: What logits are divided by; 0 always takes the likeliest token.
        top_p: Only the likeliest tokens that together have this probability.
        seed: Of the choice; the same prompt with the same seed gets the same answer.
        stop: Texts that end the answer; they are not part of it.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def generate_arguments(self) -> dict[str, Any]:
        """What transformers' generate() is told."""
        if self.temperature == 0:
            # Greedy search warns about settings that only sampling has.
            choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            given = {"temperature": self.temperature, "top_p": self.top_p}
            choice = {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}
        return {"max_new_tokens": self.max_new_tokens, **choice}


@dataclass(frozen=True)
class Finish:
    """How an answer ended.

    Attributes:
        reason: "stop", "length", or "given up" because the caller said so.
        tokens: Tokens that were generated, one that ends the answer included.
    """

    reason: FinishReason
    tokens: int


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
) -> Finish:
    """Answer a prompt.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        prompt: Token ids [1, tokens].
        sampling: How tokens are chosen, and where the answer ends.
        on_text: Called with each piece of the answer as soon as it is certain to be part of it.
        is_stopped: Asked after every token whether to give up.
        on_token: Called after every token.

    Returns:
        How it ended. Equal seeds give equal answers if no other thread draws random numbers meanwhile.
    """
    stream = _TextStream(tokenizer, StopStrings(sampling.stop), on_text)
    prompt = prompt.to(model.device)
    # Models without a padding token make generate() warn; with one sequence at a time the choice has no effect.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    # A criterion sees each token before it is decided whether to go on; what transformers calls a streamer, after.
    def is_over(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        on_token()
        stream.take(int(tokens[0, -1]))
        return torch.full((1,), stream.stops.found or is_stopped(), device=tokens.device)

    generator: Any = model  # nn.Module.__getattr__ hides the mixin's method from the type checker
    with _seeded(model, sampling.seed):
        output = generator.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            stopping_criteria=[is_over],
            pad_token_id=pad,
            **sampling.generate_arguments(),
        )
    stream.end()
    tokens = output.shape[1] - prompt.shape[1]
    if stream.stops.found or _ends(model, int(output[0, -1])):
        return Finish("stop", tokens)
    return Finish("given up" if is_stopped() else "length", tokens)


class StopStrings:
    """Lets through the text before the first stop string, however it is cut into pieces.

    A piece that may be the beginning of a stop string is held back until the next ones decide. The first stop string is
    the one that is complete first; of two that end at one place, the longer.

    Attributes:
        found: Whether a stop string has come. Nothing is let through afterwards.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self.found = False
        self._stops = sorted(filter(None, stops), key=len, reverse=True)
        self._held = ""

    def take(self, piece: str) -> str:
        """Take the next piece of text; return what is certain to come before any stop string."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if places:
            self.found = True
            return text[: min(places)[1]]
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What was held back, now that no more text comes."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` with which `stop` begins."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)


class _TextStream:
    """Turns tokens into text as they come.

    transformers' TextStreamer cuts at spaces and starts afresh at line ends, which loses a space of every indented line
    with tokenizers that mark spaces at the beginning of words. Here the new text is the difference between decoding the
    last tokens with and without the new ones, so that a decoder always sees what stands before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: StopStrings,
        on_text: Callable[[str], None],
    ) -> None:
        self.stops = stops
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []
        self._done = 0  # of these tokens, how many have become text; they stay as the others' context

    def take(self, token: int) -> None:
        """Take the next token."""
        self._tokens.append(token)
        text = self._new_text()
        if text and not text.endswith(_REPLACEMENT):
            self._tokens = self._tokens[self._done :]
            self._done = len(self._tokens)
            self._pass_on(self.stops.take(text))

    def end(self) -> None:
        """The answer is complete."""
        self._pass_on(self.stops.take(self._new_text()) + self.stops.rest())

    def _new_text(self) -> str:
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._done])) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _pass_on(self, text: str) -> None:
        if text:
            self._on_text(text)


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
