"""Somebody who visits a server that this process is about to run in its main thread, and then presses Ctrl-C there."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 120  # others use this machine too


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def visiting(port: int, visit: Callable[[], str]) -> Iterator[list[str]]:
    """While the block runs a server, call `visit` once somebody listens at the port, then interrupt the server.

    Yields:
        A list: after the block it has what `visit` returned, or nothing where the server ended before; what `visit`
        raised is raised then.
    """
    said: list[str] = []
    failed: list[BaseException] = []
    ended = threading.Event()

    def come_and_go() -> None:
        try:
            if _is_listening(port, ended):
                said.append(visit())
        except BaseException as error:
            failed.append(error)
        if not ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    # Background jobs ignore SIGINT, and so would a server in a test run that is one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    visitor = threading.Thread(target=come_and_go, daemon=True)
    visitor.start()
    try:
        yield said
    finally:
        ended.set()
        visitor.join(SECONDS)
        signal.signal(signal.SIGINT, before)
    if failed:
        raise failed[0]


def _is_listening(port: int, ended: threading.Event) -> bool:
    """Whether somebody came to listen at a port before the server ended."""
    ends = time.monotonic() + SECONDS
    while not ended.wait(0.05):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < ends, f"nobody listens at port {port}"
        else:
            return True
    return False
