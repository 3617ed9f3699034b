"""What comes out of a model token by token: when each came, and its text, up to a stop string.

transformers' TextStreamer cuts at spaces and starts afresh at line ends, which loses a space of every indented line
with tokenizers that mark spaces at the beginning of words, and it knows no stop strings. So text is made here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a decoder writes for bytes that are no whole character yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens of a prompt that decide how the text after it begins: a character may take four, and one more has its space.
_CONTEXT = 8


class TokenTimes:
    """When each new token came since this was made: what transformers calls a streamer, as far as it calls it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._times: list[float] = []
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token a call."""
        if not self._prompt_is_next:
            self._times.append(time.perf_counter())
        self._prompt_is_next = False

    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def first_token_seconds(self) -> float:
        """Until the first token, which is the prompt's time."""
        return self._times[0] - self._began

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; 0 where there are none."""
        return (len(self._times) - 1) / (self._times[-1] - self._times[0]) if len(self._times) > 1 else 0.0


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


class TextStream:
    """Turns tokens into text as they come.

    The new text is the difference between decoding the last tokens with and without the new ones, so that a decoder
    always sees what stands before.

    Args:
        tokenizer: The model's.
        stops: Where the text ends.
        on_text: Called with each piece as soon as it is whole characters and certain to be wanted.
        before: Tokens whose text is there already, and goes on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: StopStrings,
        on_text: Callable[[str], None],
        before: Sequence[int] = (),
    ) -> None:
        self.stops = stops
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens = list(before[-_CONTEXT:])
        self._done = len(self._tokens)  # of these tokens, how many have become text; they stay as the others' context

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
