"""From an address to a running server."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from vptq.errors import ConfigError

# What is still running after the last answers were given up is cut off; only a token that takes long can be in the way.
CUT_OFF_SECONDS = 10
# Connections that wait or do nothing cost little, but not nothing.
MAX_CONNECTIONS = 512


def bind(host: str, port: int) -> socket.socket:
    """Take an address, so that one in use is known before a model is loaded; nobody can connect yet.

    Args:
        host: Name or number of one of this machine's addresses.
        port: 0 for any free one.

    Raises:
        ConfigError: The address is not this machine's, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen at --host {host} --port {port}: {reason}; choose another") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only programs on this machine can reach an address."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """The address for people."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class GracefulServer(uvicorn.Server):
    """Runs an application; `run(sockets=[...])` serves until a signal or `should_exit` ends it.

    It then takes no more connections and lets requests finish, but not for longer than some time.

    Args:
        app: What to serve.
        grace: Seconds that unfinished requests have.
        give_up: Called after them: makes what is unfinished end.
    """

    def __init__(self, app: Starlette, grace: int, give_up: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=grace + CUT_OFF_SECONDS,
        )
        super().__init__(config)
        self._grace = grace
        self._give_up = give_up

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop as described; uvicorn calls this."""
        deadline = asyncio.get_running_loop().call_later(self._grace, self._give_up)
        await super().shutdown(sockets)
        deadline.cancel()
