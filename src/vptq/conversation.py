"""A conversation with a model: its turns, the model's chat template, and how much of it the context still holds.

Every answer runs the template over all turns, because only that is sure to be what the model was trained on. The part
that the last answer has already put into the key-value cache, which is nearly all of it, is not run again.

When the turns outgrow the context the model forgets the oldest question with its answer; they stay in `messages`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vptq.errors import ConfigError
from vptq.sampling import Sampling
from vptq.streaming import TimedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]
FORMAT_VERSION = 1
# A prompt may fill the context up to here; an answer that is asked to be longer than the rest is cut there.
ROOM_FOR_ANSWER = 0.25


@dataclass(frozen=True)
class Answer:
    """What a model answered, and how fast.

    Attributes:
        text: The answer, without special tokens.
        tokens: How many tokens it has.
        first_token_seconds: Time until the first of them, which is the prompt's.
        tokens_per_second: Of those after the first; 0 where there are none.
        context_tokens: Prompt and answer together.
        reused_tokens: Of the prompt, how many were in the cache from the answer before.
        forgotten_turns: Turns that the context held until this one needed their place.
        stopped: Whether the caller stopped it.
        cut: Whether it ends because no more tokens were allowed.
    """

    text: str
    tokens: int
    first_token_seconds: float
    tokens_per_second: float
    context_tokens: int
    reused_tokens: int
    forgotten_turns: int
    stopped: bool
    cut: bool


class Conversation:
    """Turns of one conversation, and what answering the next needs.

    Attributes:
        messages: Every turn, as {"role": "user" or "assistant", "content": text}, in turns.
        system_prompt: What the model is told before them; empty for nothing.
        sampling: How tokens are chosen.
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
        self._forgotten = 0  # messages at the beginning that the context no longer holds
        self._cache: DynamicCache | None = None
        self._cached_ids = torch.empty(0, dtype=torch.int64)

    @property
    def has_template(self) -> bool:
        """Whether the model knows turns; without, each question is a text by itself, to be continued."""
        return bool(self.tokenizer.chat_template)

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together; None where neither model nor tokenizer states a limit."""
        stated = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limit = stated or self.tokenizer.model_max_length
        return int(limit) if limit < 1e9 else None  # tokenizers say 1e30 for "no limit"

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
        self.messages.append({"role": "user", "content": question})
        try:
            answer = self._answer(self._fitting_prompt(), before, on_text, stop)
        except BaseException:
            self.messages.pop()
            self._forgotten = before
            self._cache = None  # it may hold half a token
            raise
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

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
        """Token ids [tokens] of as many of the last turns as leave room for an answer."""
        context = self.context
        while True:
            ids = self._prompt()
            if context is None:
                return ids
            room = min(self.sampling.max_new_tokens, int(context * ROOM_FOR_ANSWER))
            if len(ids) + room <= context:
                return ids
            if self._forgotten + 1 == len(self.messages) or not self.has_template:
                if len(ids) < context:
                    return ids
                raise ConfigError(f"this question is {len(ids)} tokens long with all that goes before it; "
                                  f"the model's context holds {context}; ask something shorter")  # fmt: skip
            self._forgotten += 2

    def _prompt(self) -> Tensor:
        if not self.has_template:
            encoded = self.tokenizer(self.messages[-1]["content"], return_tensors="pt")
        else:
            encoded = templated(self.tokenizer, self.system_prompt, self.messages[self._forgotten :])
        ids: Tensor = encoded["input_ids"][0]
        return ids

    def _answer(
        self, prompt: Tensor, forgotten_before: int, on_text: Callable[[str], None], stop: Callable[[], bool]
    ) -> Answer:
        cache, reused = self._reusable_cache(prompt)
        room = self.sampling.max_new_tokens if self.context is None else self.context - len(prompt)
        allowed = min(self.sampling.max_new_tokens, room)
        ids = prompt[None].to(self.model.device)
        # Models without a padding token make generate() warn; with one sequence at a time the choice has no effect.
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        streamer = TimedText(self.tokenizer, on_text)
        generator: Any = self.model  # nn.Module.__getattr__ hides the mixin's method from the type checker
        self.sampling.seed_random()
        began = time.perf_counter()
        output = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            stopping_criteria=[lambda tokens, scores: torch.full((len(tokens),), stop(), device=tokens.device)],
            pad_token_id=pad,
            return_dict_in_generate=True,
            **({} if cache is None else {"past_key_values": cache}),
            **self.sampling.generate_arguments(),
            max_new_tokens=allowed,
        )
        self._keep_cache(output)
        tokens = output.sequences[0, len(prompt) :]
        return Answer(
            text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
            tokens=len(tokens),
            first_token_seconds=streamer.clock.times[0] - began,
            tokens_per_second=streamer.clock.tokens_per_second,
            context_tokens=len(prompt) + len(tokens),
            reused_tokens=reused,
            forgotten_turns=(self._forgotten - forgotten_before) // 2,
            stopped=stop(),
            cut=len(tokens) == allowed and not stop() and not self._ends(tokens),
        )

    def _ends(self, tokens: Tensor) -> bool:
        """Whether the last token is one that ends an answer."""
        config: Any = self.model.generation_config
        ends = config.eos_token_id
        return int(tokens[-1]) in (ends if isinstance(ends, list) else [ends])

    def _reusable_cache(self, prompt: Tensor) -> tuple[DynamicCache | None, int]:
        """The last answer's cache, cut to what it has in common with a prompt, and how many tokens that are."""
        if self._cache is None:
            return None, 0
        length = min(len(self._cached_ids), len(prompt) - 1)  # one token has to run, to predict the next
        differing = (self._cached_ids[:length] != prompt[:length]).nonzero()
        common = int(differing[0]) if len(differing) else length
        surplus = len(self._cached_ids) - common
        if common == 0:
            return None, 0
        if surplus:
            self._cache.crop(-surplus)
        return self._cache, common

    def _keep_cache(self, output: Any) -> None:
        """Keep what generate() leaves, if it can be cut at any token: not a sliding window, not a running state."""
        cache = output.past_key_values
        if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
            self._cache, self._cached_ids = cache, output.sequences[0, : cache.get_seq_length()].cpu()
        else:
            self._cache = None


def templated(tokenizer: PreTrainedTokenizerBase, system_prompt: str, messages: list[Message]) -> Any:
    """A conversation as model inputs: input_ids and attention_mask, each [1, tokens].

    Some models' templates know no system role and raise on it (whatever their authors chose to raise); those get the
    system prompt in front of the first question.
    """
    arguments: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        return tokenizer.apply_chat_template([*system, *messages], **arguments)
    except Exception:
        if not system:
            raise
        first, *rest = messages
        merged = {**first, "content": f"{system_prompt}\n\n{first['content']}"}
        return tokenizer.apply_chat_template([merged, *rest], **arguments)
