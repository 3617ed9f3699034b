"""Putting the page on an address, so that browsers get nothing from anywhere else.

Gradio brings its scripts and fonts along, but a model's answer is Markdown and may name a picture somewhere, which a
browser would fetch. The content policy that goes with every response forbids it.
"""

from __future__ import annotations

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vptq.errors import ConfigError

# Gradio's own page has scripts and styles in line, compiles charts, and keeps uploads as blobs.
CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class ContentPolicy:
    """Adds the policy to every response of an application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy)


def launch(page: gr.Blocks, host: str, port: int | None, share: bool = False, wait: bool = True) -> str:
    """Serve a page.

    Args:
        page: What `make_page` gave.
        host: Address to listen at.
        port: Port; None for a free one.
        share: Make a public link through Gradio's servers.
        wait: Whether to return only when the server ends.

    Returns:
        The page's address.

    Raises:
        ConfigError: The address is not this machine's, or in use.
    """
    # The engine has the queue, because it can say how long it is; Gradio's would only hold requests back from it.
    page.queue(default_concurrency_limit=None, api_open=False)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=not wait,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(ContentPolicy)]},
        )
    except OSError as error:
        message = f"cannot listen at --host {host} --port {port}: in use, or not this machine's; choose another"
        raise ConfigError(message) from error
    return str(url)
