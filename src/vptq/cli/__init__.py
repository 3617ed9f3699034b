"""The command line: `vptq` and `python -m vptq`.

One file a command; each is thin, and does nothing that the Python API cannot. Heavy imports (torch, transformers) are
made inside the commands, so that help and usage errors are instant.

Exit status: 0; 1 for an error, told in one line; 2 for wrong usage; 130 when interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
    quantize,
    serve,
    webchat,
)
from vptq.cli.console import print_error
from vptq.errors import VPTQError

__all__ = ["app", "main"]

app = typer.Typer(
    name="vptq",
    add_completion=False,
    # Rich's help panels cut long option names off, and its markup swallows what stands in brackets.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A traceback means a bug here; rich's version of it would hide the part to report among the local variables.
    pretty_exceptions_enable=False,
)
app.callback(invoke_without_command=True)(generate.generate)
app.command("quantize")(quantize.quantize)
app.command("plan")(plan.plan)
app.command("finetune")(finetune.finetune)
app.command("chat")(chat.chat)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("serve")(serve.serve)
app.command("app")(webchat.webchat)
app.command("info")(info.info)
app.command("env")(env.env)
app.command("doctor")(doctor.doctor)


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
