"""Bringing an answer to its client, whole or as a stream, and stopping it when the client has gone away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vptq.engine import Answer, GivenUpError
from vptq.serve.protocol import ApiError
from vptq.serve.replies import STREAM_END, Reply, event

LOG = logging.getLogger(__name__)
STOPPING = ApiError(503, "the server is stopping and could not finish this answer", "server_error")


async def whole_text(request: Request, answer: Answer) -> str:
    """The answer's text, once it is complete.

    Raises:
        ClientDisconnect: The client did not wait for it.
        ApiError: The server did not.
    """

    async def collect() -> str:
        return "".join([piece async for piece in answer.pieces()])

    text, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((text, gone), return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            raise ClientDisconnect
        return text.result()
    except GivenUpError:
        raise STOPPING from None
    finally:
        answer.stop()
        text.cancel()
        gone.cancel()


class EventStream(StreamingResponse):
    """An answer as server-sent events, its tokens counted in the end if `with_usage`.

    Starlette cancels the stream when the client goes away, perhaps before its first event; the answer stops with it.
    """

    def __init__(self, answer: Answer, reply: Reply, with_usage: bool) -> None:
        # A proxy in between must neither keep events nor collect them.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(answer, reply, with_usage)
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.stop()


async def _events(answer: Answer, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    if first := reply.first_event():
        yield first
    try:
        async for piece in answer.pieces():
            yield reply.text_event(piece)
    except GivenUpError:
        yield event(STOPPING.body)
        return
    except Exception:  # the status line has been sent: only an event can still tell
        LOG.exception("an answer failed")
        yield event(ApiError(500, "the answer failed; the server's log says why", "server_error").body)
        return
    yield reply.finish_event(answer.finish)
    if with_usage:
        yield reply.usage_event(answer.finish)
    yield STREAM_END


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
