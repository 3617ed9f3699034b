"""The server's limits hold: keys, bodies, hosts, the queue; who goes away is not answered, and stopping is orderly."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("openai", reason="the official client is not installed: pip install openai")
pytest.importorskip("uvicorn", reason="the extra is not installed: pip install 'vptq[serve]'")

import openai

from vptq.engine import Answer, Engine
from vptq.errors import ConfigError
from vptq.serve.delivery import EventStream
from vptq.serve.listen import bind, is_loopback
from vptq.serve.replies import Reply

from .conftest import wait_until

ARGUMENTS: Any = {"model": "tiny", "prompt": "ba de fi", "temperature": 0}


def test_only_those_with_the_key_get_in(serve: Any) -> None:
    assert serve(api_key="right", client_key="right").completions.create(**ARGUMENTS).usage.completion_tokens == 16
    client = serve(api_key="right", client_key="wrong")
    for ask in (client.models.list, lambda: client.completions.create(**ARGUMENTS)):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask()
        assert caught.value.code == "invalid_api_key"
    with urllib.request.urlopen(str(client.base_url.join("/health"))) as answer:
        assert json.load(answer) == {"status": "ok"}


def post(client: Any, body: bytes, headers: dict[str, str], method: str = "POST") -> tuple[int, Any]:
    """Status and error of a request to /v1/completions."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=60)
    connection.request(method, "/v1/completions", body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(text)["error"] if is_json else text


def test_requests_of_web_pages_and_other_nonsense_are_refused_as_errors_of_the_protocol(serve: Any) -> None:
    client = serve(body=2000)
    is_json = {"Content-Type": "application/json"}
    for expected, body, headers in (
        (415, b"{}", {"Content-Type": "text/plain"}),
        (400, b"{", is_json),
        (400, b"[" * 1500, is_json),
        (400, b"\xff\xfe", is_json),
        (413, b" " * 3000, is_json),
    ):
        status, error = post(client, body, headers)
        assert status == expected
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    status, error = post(client, b"", {}, "GET")
    assert (status, error["message"]) == (405, "GET /v1/completions: Method Not Allowed")
    assert post(client, b"{}", {**is_json, "Host": "elsewhere.example"}) == (400, b"Invalid host header")


def stream(client: Any, **arguments: Any) -> Any:
    return client.completions.create(**ARGUMENTS, stream=True, max_tokens=60, **arguments)


def test_one_more_than_the_queue_holds_gets_429_and_the_others_their_answers(
    serve: Any, slow: threading.Semaphore
) -> None:
    client = serve(queue=2)
    accepted = [stream(client) for _ in range(3)]  # a stream begins at once, its text when it is its turn
    with pytest.raises(openai.RateLimitError) as caught:
        stream(client)
    assert caught.value.code == "rate_limit_exceeded"
    slow.release(10_000)
    assert len({"".join(chunk.choices[0].text for chunk in chunks) for chunks in accepted}) == 1
    assert client.completions.create(**ARGUMENTS).usage.completion_tokens == 16


@pytest.mark.parametrize("streaming", [True, False])
def test_the_answer_of_a_client_that_goes_away_ends(streaming: bool, serve: Any, slow: threading.Semaphore) -> None:
    client = serve(queue=0)
    if streaming:
        chunks = stream(client)
        slow.release(5)
        next(iter(chunks))
        chunks.close()
    else:
        slow.release(5)
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**ARGUMENTS, max_tokens=60, timeout=1)
    tries = 0

    def is_over() -> bool:
        nonlocal tries
        tries += 1
        slow.release(2)  # one for each of the two
        return is_answered(client)

    # There is no room to wait in: a second request is answered only when the first is over.
    wait_until(is_over)
    assert tries < 15, "the rest of the answer was computed for nobody"


def is_answered(client: Any) -> bool:
    try:
        client.completions.create(**{**ARGUMENTS, "max_tokens": 1})
    except openai.RateLimitError:
        return False
    return True


def test_who_leaves_the_queue_is_not_answered(serve: Any, slow: threading.Semaphore) -> None:
    client = serve(queue=1)
    first, second = stream(client), stream(client)
    second.close()
    wait_until(lambda: accepts(client))
    slow.release(10_000)
    assert sum(1 for _ in first) > 30


def test_who_leaves_before_the_first_event_is_not_answered() -> None:
    async def leave() -> bool:
        answer = Answer(Engine(0), asyncio.get_running_loop())

        async def send(_: Any) -> None:
            await asyncio.sleep(60)

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        await EventStream(answer, Reply("tiny"), False)({"type": "http"}, receive, send)
        return answer.is_stopped()

    assert asyncio.run(leave())


def accepts(client: Any) -> bool:
    try:
        stream(client).close()
    except openai.RateLimitError:
        return False
    return True


def test_a_stopping_server_finishes_what_it_has_begun_and_takes_no_more(serve: Any, slow: threading.Semaphore) -> None:
    client = serve()
    accepted = [stream(client) for _ in range(2)]
    client.server.should_exit = True

    def is_refused() -> bool:
        try:
            socket.create_connection((client.base_url.host, client.base_url.port), timeout=5).close()
        except OSError:
            return True
        return False

    wait_until(is_refused)
    assert client.thread.is_alive()
    slow.release(10_000)
    texts = ["".join(chunk.choices[0].text for chunk in chunks) for chunks in accepted]
    assert texts[0] == texts[1] != ""
    client.thread.join(60)
    assert not client.thread.is_alive()


def test_a_stopping_server_waits_only_so_long_and_says_so(serve: Any, slow: threading.Semaphore) -> None:
    client = serve(grace=1)
    running, waiting = stream(client), stream(client)
    client.server.should_exit = True
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(waiting)
    slow.release(1)  # the model cannot be stopped in the middle of a token
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(running)
    client.thread.join(60)
    assert not client.thread.is_alive()


def test_many_requests_at_a_time_are_all_answered_alike(serve: Any) -> None:
    client = serve(queue=8)

    def ask(number: int) -> str:
        if number % 2:
            return "".join(chunk.choices[0].text for chunk in client.completions.create(**ARGUMENTS, stream=True))
        return str(client.completions.create(**ARGUMENTS).choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(24)))) == 1


def test_an_address_in_use_is_an_error_in_one_line() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert is_loopback(listener)
        listener.listen()
        with pytest.raises(ConfigError, match=r"--port .*choose another"):
            bind("127.0.0.1", listener.getsockname()[1])
    with bind("0.0.0.0", 0) as listener:
        assert not is_loopback(listener)
