"""The HTTP side: routes, limits, and what happens when somebody goes away or the server has to.

Stopping the server is uvicorn's work: it stops listening, lets what is being answered end, and cancels what is left
after a while. All that is needed here is that a cancelled request gives its place in the engine up.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vptq.engine import Answer, Engine, QueueFullError
from vptq.errors import ConfigError
from vptq.generation import Finish, chat_prompt, generate_text, text_prompt
from vptq.serve.delivery import EventStream, whole_text
from vptq.serve.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest, parse
from vptq.serve.replies import CompletionReply, Reply

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How long a client may take to send what it asks.
BODY_SECONDS = 30.0


@dataclass(frozen=True)
class ServedModel:
    """A model and the name by which clients know it.

    Attributes:
        name: What requests call it.
        model: The model.
        tokenizer: Its tokenizer.
        context: Most tokens of prompt and answer together.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int


@dataclass(frozen=True)
class Limits:
    """What the server puts up with.

    Attributes:
        queue: Requests that may wait while one is answered; the next gets status 429.
        body: Bytes of a request.
    """

    queue: int = 16
    body: int = 1_000_000


class Server:
    """Answers requests for one model.

    Args:
        served: The model.
        limits: What to put up with.
        api_key: What clients must have; empty for nothing.
    """

    def __init__(self, served: ServedModel, limits: Limits, api_key: str = "") -> None:
        self._served = served
        self._limits = limits
        self._api_key = api_key.encode()
        self._engine = Engine(limits.queue)
        self._since = int(time.time())

    def app(self, allowed_hosts: list[str] | None = None) -> Starlette:
        """The ASGI application.

        Args:
            allowed_hosts: Names by which clients may call the server; None for any.
        """
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._keyed(self._models)),
            Route("/v1/models/{name:path}", self._keyed(self._model)),
            Route("/v1/chat/completions", self._keyed(self._chat), methods=["POST"]),
            Route("/v1/completions", self._keyed(self._complete), methods=["POST"]),
        ]
        hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)] if allowed_hosts else []
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _nobody_there,
            Exception: _server_error,
        }
        return Starlette(routes=routes, middleware=hosts, exception_handlers=handlers, lifespan=self._lifespan)

    def give_up(self) -> None:
        """End every answer as it is; clients are told."""
        self._engine.stop_all()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._engine.close)

    def _keyed(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for those who have the key."""

        async def checked(request: Request) -> Response:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            is_right = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._api_key)
            if self._api_key and not is_right:
                raise ApiError(401, "this server wants its API key as a bearer token", code="invalid_api_key")
            return await endpoint(request)

        return checked

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self._served.name, "object": "model", "created": self._since, "owned_by": "vptq"}
        return {**card, "max_model_len": self._served.context}

    async def _chat(self, request: Request) -> Response:
        wanted = await self._read(request, ChatRequest)
        messages = [message.for_template() for message in wanted.messages]
        prompt = await self._prompt(lambda: chat_prompt(self._served.tokenizer, messages))
        return await self._answer(request, wanted, prompt, Reply(self._served.name, wanted.wants_usage))

    async def _complete(self, request: Request) -> Response:
        wanted = await self._read(request, CompletionRequest)
        prompt = await self._prompt(lambda: text_prompt(self._served.tokenizer, wanted.prompt))
        return await self._answer(request, wanted, prompt, CompletionReply(self._served.name, wanted.wants_usage))

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        # A web page may send text to any address without asking; JSON it may not.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the request's Content-Type must be application/json")
        try:
            wanted = parse(kind, await asyncio.wait_for(self._body(request), BODY_SECONDS))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request took longer than {BODY_SECONDS:g} s to come") from None
        self._check_name(wanted.model)
        return wanted

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._limits.body:
                raise ApiError(413, f"the request has more than {self._limits.body} bytes, which is the most here")
        return bytes(body)

    def _check_name(self, name: str) -> None:
        if name != self._served.name:
            message = f"there is no model {name!r:.200} here; there is {self._served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _prompt(self, tokenize: Callable[[], Tensor]) -> Tensor:
        try:
            prompt = await asyncio.to_thread(tokenize)
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        if prompt.shape[1] >= self._served.context:
            raise ApiError(
                400,
                f"the prompt has {prompt.shape[1]} tokens; prompt and answer together may have {self._served.context}",
                code="context_length_exceeded",
            )
        return prompt

    async def _answer(self, request: Request, wanted: GenerationRequest, prompt: Tensor, reply: Reply) -> Response:
        try:
            answer = self._engine.submit(lambda answer: self._generate(answer, prompt, wanted))
        except QueueFullError:
            message = f"{self._limits.queue} requests are waiting already; try again later"
            raise ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded") from None
        if wanted.stream:
            return EventStream(answer, reply, wanted.wants_usage)
        text = await whole_text(request, answer)
        return JSONResponse(reply.whole(text, answer.finish))

    def _generate(self, answer: Answer, prompt: Tensor, wanted: GenerationRequest) -> Finish:
        sampling = wanted.sampling(self._served.context - prompt.shape[1])
        return generate_text(
            *(self._served.model, self._served.tokenizer, prompt, sampling),
            on_text=answer.write,
            is_stopped=answer.is_stopped,
            on_token=answer.count_token,
            stops=wanted.stop or (),
            goes_on=isinstance(wanted, CompletionRequest),
        )


async def _api_error(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)


async def _server_error(_: Request, __: Exception) -> Response:
    """Starlette raises the exception again afterwards, so that it gets into the log."""
    return JSONResponse(ApiError(500, "the request failed; the server's log says why", "server_error").body, 500)


async def _nobody_there(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=499)
