"""Answers for the page begin with the question, and end with whoever asked it."""

import asyncio
import threading
from typing import Any

import pytest

from vptq.app.chat import Chat
from vptq.engine import Answer, Engine
from vptq.generation import Finish
from vptq.sampling import Sampling

QUESTION = [{"role": "user", "content": "ba"}]


class Recorded(Chat):
    """Instead of a model: notes that it has been asked, and goes on until it is stopped."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, {})  # type: ignore[arg-type]
        self.begun, self.ended = threading.Event(), threading.Event()

    def _generate(self, answer: Answer, *_: Any) -> Finish:
        self.begun.set()
        answer.write("fi")
        while not answer.is_stopped():
            self.ended.wait(0.01)
        self.ended.set()
        raise AssertionError("nobody looks at what it ends with")


@pytest.fixture
def chat() -> Recorded:
    return Recorded(Engine(0))


def test_a_question_is_read_before_anybody_looks_and_left_with_the_context(chat: Recorded) -> None:
    async def ask() -> None:
        with chat.asking("model", QUESTION, Sampling()):
            assert await asyncio.to_thread(chat.begun.wait, 60)
            assert not chat.ended.is_set()
        assert await asyncio.to_thread(chat.ended.wait, 60)

    asyncio.run(ask())


def test_where_too_many_wait_that_is_all_there_is_to_see(chat: Recorded) -> None:
    async def ask() -> list[tuple[str, str]]:
        with chat.asking("model", QUESTION, Sampling()), chat.asking("model", QUESTION, Sampling()) as second:
            return [shown async for shown in second]

    assert asyncio.run(ask()) == [("", "Too many are waiting already; try again later.")]


def test_text_comes_as_it_grows(chat: Recorded) -> None:
    async def ask() -> tuple[str, str]:
        with chat.asking("model", QUESTION, Sampling()) as answer:
            return await anext(aiter(answer))

    assert asyncio.run(ask()) == ("fi", "answering")
