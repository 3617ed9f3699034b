"""`vptq app [MODEL...]`: the web chat."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vptq.cli.console import messages, quiet_transformers
from vptq.cli.progress import Lines, waiting
from vptq.errors import ConfigError
from vptq.extras import needed

# The published package's words for "yes" in an environment variable, and no others.
YES = ("1", "true", "True")


def webchat(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Folders, GGUF files or hub ids to choose from; published models come after."
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port.")] = 7860,
    published: Annotated[bool, typer.Option("--published/--no-published", help="Offer published models too.")] = True,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Most questions that wait while one is answered.")] = 16,
) -> None:
    """Chat with models in a browser.

    SHARE_LINK=1 makes a public link through Gradio's servers, DOWNLOAD_MODEL=1 fetches the published models beforehand.
    """
    if not (models or published):
        raise ConfigError("there is no model to offer; name one, or leave --no-published out")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with waiting("starting"):
        quiet_transformers()
        from vptq.app.models import KNOWN_MODELS, LoadedModels, download_all, known_choice, local_choice

        choices = [local_choice(model) for model in models or []]
        choices += [known_choice(model) for model in KNOWN_MODELS] if published else []
        with needed("app", "vptq app"):
            from vptq.app.launch import launch
            from vptq.app.page import make_page
        from vptq.app.chat import Chat
        from vptq.app.monitor import Monitor
        from vptq.engine import Engine

    token = os.environ.get("HF_TOKEN") or None
    if published and os.environ.get("DOWNLOAD_MODEL") in YES:
        download_all(KNOWN_MODELS, Lines(), token)
    engine = Engine(queue)
    page = make_page(choices, engine, Chat(engine, LoadedModels(token, Lines())), Monitor())
    messages().print(f"the web chat is at http://{host}:{port}", markup=False, soft_wrap=True)
    try:
        launch(page, host, port, share=os.environ.get("SHARE_LINK") in YES)
    finally:
        engine.close()
