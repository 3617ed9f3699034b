"""A conversation with a model: its turns, the model's chat template, and how much of it the context still holds.

Every answer runs the template over all turns, because only that is sure to be what the model was trained on. The part
that the last answer has already put into the key-value cache, which is nearly all of it, is not run again.

When the turns outgrow the context the model forgets the oldest question with its answer; they stay in `messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vptq.errors import ConfigError
from vptq.generation import Finish, PrefixCache, chat_prompt, context_length, generate_text, text_prompt
from vptq.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]
FORMAT_VERSION = 1
# A prompt may fill the context up to here; an answer that is asked to be longer than the rest is cut there.
ROOM_FOR_ANSWER = 0.25


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: The answer, without special tokens.
        finish: How it ended, and how fast it came.
        forgotten_turns: Turns that the context held until this one needed their place.
    """

    text: str
    finish: Finish
    forgotten_turns: int


class Conversation:
    """Turns of one conversation, and what answering the next needs.

    Attributes:
        messages: Every turn, as {"role": "user" or "assistant", "content": text}, in turns.
        system_prompt: What the model is told before them; empty for nothing.
        sampling: How tokens are chosen.
        context: Most tokens of prompt and answer together; None where neither model nor tokenizer states a limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str = "",
        sampling: Sampling | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.sampling = sampling or Sampling()
        self.messages: list[Message] = []
        self.context = context_length(model, tokenizer)
        self._forgotten = 0  # messages at the beginning that the context no longer holds
        self._cache = PrefixCache()

    @property
    def has_template(self) -> bool:
        """Whether the model knows turns; without, each question is a text by itself, to be continued."""
        return bool(self.tokenizer.chat_template)

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []
        self._forgotten = 0

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Take one turn.

        Args:
            question: What to say to the model.
            on_text: Called with each piece of the answer as soon as it is there.
            stop: Asked after every token whether to end the answer here; what there is of it is kept.

        Raises:
            ConfigError: The question alone is longer than the context. As after every error, the turn has not happened.
        """
        before = self._forgotten
        pieces: list[str] = []

        def on_piece(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        self.messages.append({"role": "user", "content": question})
        try:
            prompt = self._fitting_prompt()
            finish = generate_text(
                *(self.model, self.tokenizer, prompt, self.sampling, on_piece), is_stopped=stop, cache=self._cache
            )
        except BaseException:
            self.messages.pop()
            self._forgotten = before
            raise
        text = "".join(pieces).strip()
        self.messages.append({"role": "assistant", "content": text})
        return Answer(text, finish, (self._forgotten - before) // 2)

    def to_dict(self) -> dict[str, Any]:
        """The conversation as plain data; `load_dict` takes it."""
        return {
            "version": FORMAT_VERSION,
            "model": self.model.name_or_path,
            "system_prompt": self.system_prompt,
            "sampling": asdict(self.sampling),
            "messages": self.messages,
        }

    def load_dict(self, data: Any) -> None:
        """Go on with a stored conversation in place of this one, which stays as it is where that cannot be done.

        Raises:
            ConfigError: It is no conversation of this version.
        """
        if not isinstance(data, Mapping) or data.get("version") != FORMAT_VERSION:
            raise ConfigError(f"this is no conversation of version {FORMAT_VERSION}, as /save writes it")
        system_prompt, messages = data.get("system_prompt"), data.get("messages")
        if not isinstance(system_prompt, str) or not isinstance(messages, list):
            raise ConfigError("a conversation needs a system_prompt (text) and messages (a list)")
        for index, message in enumerate(messages):
            role = ("user", "assistant")[index % 2]
            content = message.get("content") if isinstance(message, Mapping) else None
            if not isinstance(content, str) or set(message) != {"role", "content"} or message["role"] != role:
                raise ConfigError(f"message {index} of the conversation must be a role, {role!r}, and a content, text")
        if len(messages) % 2:
            raise ConfigError("the conversation ends with a question; its last message must be an answer")
        sampling = Sampling.from_dict(data.get("sampling"))
        self.reset()
        self.system_prompt, self.sampling, self.messages = system_prompt, sampling, [dict(each) for each in messages]

    def _fitting_prompt(self) -> Tensor:
        """Token ids [1, tokens] of as many of the last turns as leave room for an answer; of one turn at least."""
        prompt = self._prompt()
        if self.context is None or not self.has_template:
            return prompt
        room = min(self.sampling.max_new_tokens, int(self.context * ROOM_FOR_ANSWER))
        while prompt.shape[1] + room > self.context and self._forgotten + 1 < len(self.messages):
            self._forgotten += 2
            prompt = self._prompt()
        return prompt

    def _prompt(self) -> Tensor:
        if not self.has_template:
            return text_prompt(self.tokenizer, self.messages[-1]["content"])
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return chat_prompt(self.tokenizer, [*system, *self.messages[self._forgotten :]])
