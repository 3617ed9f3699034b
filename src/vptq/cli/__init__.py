"""The command line: `vptq` and `python -m vptq`.

One file a command; each is thin, and does nothing that the Python API cannot. Heavy imports (torch, transformers) are
made inside the commands, so that help and usage errors are instant.

Exit status: 0; 1 for an error, told in one line; 2 for wrong usage; 130 when interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

from vptq.cli import (
    bench,
    chat,
    compare,
    doctor,
    env,
    evaluate,
    finetune,
    generate,
    info,
    plan,
    push,
    quantize,
    serve,
    webchat,
)
from vptq.cli.console import print_error
from vptq.cli.examples import epilog
from vptq.errors import VPTQError

__all__ = ["app", "main"]

app = typer.Typer(
    name="vptq",
    # Rich's help panels cut long option names off, and its markup swallows what stands in brackets.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A traceback means a bug here; rich's version of it would hide the part to report among the local variables.
    pretty_exceptions_enable=False,
)
app.callback(invoke_without_command=True, epilog=epilog(""))(generate.generate)
COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize.quantize,
    "plan": plan.plan,
    "finetune": finetune.finetune,
    "chat": chat.chat,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "compare": compare.compare,
    "serve": serve.serve,
    "app": webchat.webchat,
    "push": push.push,
    "info": info.info,
    "env": env.env,
    "doctor": doctor.doctor,
}
for name, command in COMMANDS.items():
    app.command(name, epilog=epilog(name))(command)


def main(arguments: Sequence[str] | None = None, program: str = "vptq") -> None:
    """Run the command line and exit.

    Args:
        arguments: The words after the program's name; None for this process's own.
        program: How the help text calls the program.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name=program)
    except VPTQError as error:
        print_error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
