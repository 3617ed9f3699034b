"""One thread that answers requests in turn, for servers that run in an event loop.

A model answers one prompt at a time: kernels already use every core for it, and two at once would each take twice as
long. So the engine is a queue: first come, first served, with a limit, above which a request is refused at once instead
of waiting for longer than anybody would. A request that nobody waits for any longer leaves the queue, or ends at its
next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vptq.generation import Finish

# What a request does in the engine's thread: writes its answer with `Answer.write`, and heeds `Answer.is_stopped`.
Work = Callable[["Answer"], "Finish"]


class QueueFullError(Exception):
    """As many requests are waiting as may."""


class GivenUpError(Exception):
    """An answer was stopped before its end."""


class Engine:
    """Answers requests in turn, in a thread of its own. All methods are for the event loop's thread.

    Args:
        queue: Most requests that may wait while one is answered.

    Attributes:
        tokens: Tokens generated since the beginning, whoever asked.
    """

    def __init__(self, queue: int) -> None:
        self.tokens = 0
        self._queue = queue
        self._unfinished: list[Answer] = []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vptq-engine")

    def submit(self, work: Work) -> Answer:
        """Queue a request.

        Raises:
            QueueFullError: Too many are waiting already.
        """
        if len(self._unfinished) > self._queue:
            raise QueueFullError
        answer = Answer(self, asyncio.get_running_loop())
        self._unfinished.append(answer)
        answer.begin(self._worker.submit(work, answer))
        return answer

    def ahead_of(self, answer: Answer) -> int:
        """How many requests are before this one; 0 when it is its turn."""
        return self._unfinished.index(answer) if answer in self._unfinished else 0

    def stop_all(self) -> None:
        """Stop every answer."""
        for answer in tuple(self._unfinished):
            answer.stop()

    def close(self) -> None:
        """Stop every answer and end the thread, which may take until the next token."""
        self.stop_all()
        self._worker.shutdown(wait=True)

    def forget(self, answer: Answer) -> None:
        """An answer is finished."""
        self._unfinished.remove(answer)


class Answer:
    """The answer to one request, for the event loop; what is for the engine's thread says so."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._has_begun = asyncio.Event()
        self._stopped = threading.Event()
        self._future: Future[Finish] | None = None
        self._finish: Finish | None = None

    def begin(self, future: Future[Finish]) -> None:
        """Say what becomes of the work."""
        self._future = future
        future.add_done_callback(lambda _: self._tell(self._end))

    def write(self, piece: str) -> None:
        """Add text. From the engine's thread."""
        self._tell(self._receive, piece)

    def count_token(self) -> None:
        """Count a token. From the engine's thread."""
        self._engine.tokens += 1

    @property
    def finish(self) -> Finish:
        """How the answer ended, once all its pieces have come."""
        assert self._finish is not None, "the answer is not complete"
        return self._finish

    def is_stopped(self) -> bool:
        """Whether nobody wants the rest. From any thread."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Leave the queue, or end at the next token. May be called again, and afterwards."""
        self._stopped.set()
        if self._future is not None:
            self._future.cancel()

    async def begins_within(self, seconds: float) -> bool:
        """Wait for the first piece, or the end of an answer without any, but not for longer than this."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._has_begun.wait(), seconds)
        return self._has_begun.is_set()

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it comes, to be asked for once.

        Leaving it stops the work.

        Raises:
            GivenUpError: The answer was stopped. And whatever the work raised.
        """
        try:
            while (piece := await self._pieces.get()) is not None:
                yield piece
        finally:
            self.stop()
        finish = None if self._future is None or self._future.cancelled() else self._future.result()
        if finish is None or finish.reason == "given up":
            raise GivenUpError
        self._finish = finish

    def _end(self) -> None:
        self._engine.forget(self)
        self._receive(None)

    def _receive(self, piece: str | None) -> None:
        self._pieces.put_nowait(piece)
        self._has_begun.set()

    def _tell(self, what: Callable[..., None], *arguments: str) -> None:
        """Do something in the event loop, unless that has ended meanwhile and with it everybody who would care."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *arguments)
