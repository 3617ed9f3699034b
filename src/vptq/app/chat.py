"""Answers for the page: a conversation goes in, growing text with a line about how it goes comes out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vptq.app.models import LoadedModels
from vptq.engine import Answer, Engine, QueueFullError
from vptq.errors import VPTQError
from vptq.generation import WORDLESS, Finish, chat_prompt, generate_text, text_prompt
from vptq.sampling import Sampling

# How often somebody who waits is told how things stand, in seconds.
PATIENCE = 1.0


class Chat:
    """Answers of any model, in turn.

    Args:
        engine: Where they wait for each other.
        models: The models; used in the engine's thread.
    """

    def __init__(self, engine: Engine, models: LoadedModels) -> None:
        self._engine = engine
        self._models = models

    @contextmanager
    def asking(
        self, model: str, messages: Sequence[Mapping[str, Any]], sampling: Sampling
    ) -> Iterator[AsyncIterator[tuple[str, str]]]:
        """While this is open a conversation is answered, whether or not somebody looks yet; leaving it stops that.

        Args:
            model: As `LoadedModels.get` takes it.
            messages: Turns, with content as Gradio keeps it.
            sampling: How tokens are chosen.

        Yields:
            What there is to see, as it comes: the text so far, and a line about it.
        """
        turns = [{"role": message["role"], "content": plain_text(message["content"])} for message in messages]
        try:
            answer = self._engine.submit(lambda answer: self._generate(answer, model, turns, sampling))
        except QueueFullError:
            yield _said("Too many are waiting already; try again later.")
            return
        try:
            yield self._follow(answer, model)
        finally:
            answer.stop()

    async def _follow(self, answer: Answer, model: str) -> AsyncIterator[tuple[str, str]]:
        try:
            async for shown in self._grow(answer, model):
                yield shown
        except VPTQError as error:
            yield "", f"Error: {error}"

    async def _grow(self, answer: Answer, model: str) -> AsyncIterator[tuple[str, str]]:
        while not await answer.begins_within(PATIENCE):
            yield "", self._waiting(answer, model)
        text = ""
        async for piece in answer.pieces():
            text += piece
            yield text, "answering"
        if not text:
            yield "", WORDLESS
            return
        finish = answer.finish
        speed = f", {finish.tokens_per_second:.1f} tokens/s" if finish.tokens_per_second else ""
        cut = ", cut there" if finish.reason == "length" else ""
        yield text, f"{finish.length}{speed}, first after {finish.first_token_seconds:.2f} s{cut}"

    def _waiting(self, answer: Answer, model: str) -> str:
        if ahead := self._engine.ahead_of(answer):
            return f"Waiting: {ahead} before this one"
        return "Reading the question" if model in self._models else "Loading the model"

    def _generate(self, answer: Answer, model: str, turns: list[dict[str, str]], sampling: Sampling) -> Finish:
        loaded, tokenizer, cache = self._models.get(model)
        # Without a template the model only continues text, and knows no turns.
        prompt = (
            chat_prompt(tokenizer, turns) if tokenizer.chat_template else text_prompt(tokenizer, turns[-1]["content"])
        )
        return generate_text(
            *(loaded, tokenizer, prompt, sampling),
            on_text=answer.write,
            is_stopped=answer.is_stopped,
            on_token=answer.count_token,
            cache=cache,
        )


async def _said(status: str) -> AsyncIterator[tuple[str, str]]:
    yield "", status


def plain_text(content: Any) -> str:
    """The text of a message, which Gradio keeps as text or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")
