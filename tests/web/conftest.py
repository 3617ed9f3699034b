"""A server on a loopback port in this process, and the official client to ask it with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Nothing that may be missing is imported here: the test modules say what they need, and are skipped without it.
if TYPE_CHECKING:
    import openai

    from vptq.serve.server import ServedModel

Serve = Callable[..., "openai.OpenAI"]


@pytest.fixture(scope="session")
def served(tiny_model_folder: Path) -> ServedModel:
    """The tiny model under the name "tiny"."""
    from vptq.generation import context_length
    from vptq.model import AutoModelForCausalLM
    from vptq.serve.server import ServedModel
    from vptq.source import load_tokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_folder), load_tokenizer(tiny_model_folder)
    return ServedModel("tiny", model, tokenizer, context_length(model, tokenizer) or 0)


@pytest.fixture
def slow(served: ServedModel) -> Iterator[threading.Semaphore]:
    """Lets the model make as many tokens as are released, one by one; enough are in the end."""
    tokens = threading.Semaphore(0)

    def wait(*_: object) -> None:
        tokens.acquire(timeout=60)

    hook = served.model.register_forward_pre_hook(wait)
    yield tokens
    hook.remove()
    tokens.release(10_000)


@pytest.fixture
def serve(served: ServedModel) -> Iterator[Serve]:
    """Starts a server with these limits; gives a client of it, which knows uvicorn's `server` and its `thread`."""
    import openai

    from vptq.serve.listen import GracefulServer, bind, url_of
    from vptq.serve.server import Limits, Server

    running: list[tuple[GracefulServer, threading.Thread]] = []

    def serve(api_key: str = "", client_key: str = "unused", grace: int = 30, **limits: Any) -> openai.OpenAI:
        listener = bind("127.0.0.1", 0)
        application = Server(served, Limits(**limits), api_key)
        server = GracefulServer(application.app(["127.0.0.1"]), grace, application.give_up)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        wait_until(lambda: server.started)
        client: Any = openai.OpenAI(base_url=f"{url_of(listener)}/v1", api_key=client_key, max_retries=0, timeout=120)
        client.server, client.thread = server, thread
        return client

    yield serve
    for server, thread in running:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not stop"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Returns as soon as something is true, which may take a while on a machine that others use too."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
