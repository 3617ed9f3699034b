"""`vptq serve MODEL`."""

from __future__ import annotations

from typing import Annotated

import typer

from vptq.cli.console import messages, print_warning, quiet_transformers
from vptq.cli.loading import load
from vptq.cli.options import CodebookFormOption, ModelArgument, TokenizerOption
from vptq.cli.progress import waiting
from vptq.errors import ConfigError
from vptq.extras import needed

# Of models that state no limit of their own.
DEFAULT_CONTEXT = 4096


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    name: Annotated[
        str, typer.Option("--name", help="What clients call the model.  [default: the folder's name]")
    ] = "",
    api_key: Annotated[
        str, typer.Option("--api-key", envvar="VPTQ_API_KEY", help="What clients must have.", show_default=False)
    ] = "",
    context: Annotated[
        int | None,
        typer.Option("--context", min=2, help="Most tokens of prompt and answer together.  [default: the model's]"),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Most requests that wait; more get status 429.")] = 16,
    max_body: Annotated[int, typer.Option("--max-body", min=1000, help="Most bytes of a request.")] = 1_000_000,
    grace: Annotated[int, typer.Option("--grace", min=0, help="Seconds to finish requests in at the end.")] = 30,
    tokenizer: TokenizerOption = "",
    codebook_form: CodebookFormOption = "",
) -> None:
    """Serve a model by OpenAI's protocol."""
    with waiting("starting"):
        quiet_transformers()
        from vptq.generation import context_length
        from vptq.source import resolve_model

        source = resolve_model(model)
        with needed("serve", "vptq serve"):
            from vptq.serve.listen import GracefulServer, bind, is_loopback, url_of
            from vptq.serve.server import Limits, ServedModel, Server
    with bind(host, port) as listener:
        if not (is_loopback(listener) or api_key):
            print_warning(f"anybody who can reach {url_of(listener)} can use the model; --api-key asks them for a key")
        loaded, loaded_tokenizer = load(model, tokenizer, codebook_form=codebook_form)
        stated = context_length(loaded, loaded_tokenizer)
        if context is not None and stated is not None and context > stated:
            raise ConfigError(f"--context is {context}; the model was made for at most {stated}")
        served = ServedModel(name or source.name, loaded, loaded_tokenizer, context or stated or DEFAULT_CONTEXT)
        server = Server(served, Limits(queue, max_body), api_key)
        # A page from elsewhere can reach this machine's own addresses, but only under a name of its own.
        hosts = ["127.0.0.1", "localhost", "[::1]", host] if is_loopback(listener) else None
        listener.listen()  # from here on clients wait instead of being refused
        messages().print(f"{served.name} is at {url_of(listener)}/v1", markup=False, soft_wrap=True)
        GracefulServer(server.app(hosts), grace, server.give_up).run(sockets=[listener])
