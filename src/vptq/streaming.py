"""What transformers' generate() tells while it runs: when each token came, and the text so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import TextStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTimes:
    """When each new token came: what transformers calls a streamer, as far as it calls it."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token a call."""
        if not self._prompt_is_next:
            self.times.append(time.perf_counter())
        self._prompt_is_next = False

    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; 0 where there are none."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else 0.0


class TimedText(TextStreamer):
    """Hands text on as soon as it forms words, and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.clock = TokenTimes()
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token a call."""
        self.clock.put(value)
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece on."""
        if text:
            self._on_text(text)
