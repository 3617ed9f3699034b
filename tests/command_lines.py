"""Command lines of ours in documents and help texts: are they such that the program would take them?"""

from __future__ import annotations

from typing import Any

import typer

from vptq.cli import app


def parse(arguments: list[str]) -> None:
    """Parse a command line of ours without running it; whatever running it would refuse raises."""
    group: Any = typer.main.get_command(app)
    if arguments == ["--install-completion"]:  # to parse it is to install it
        assert any(arguments[0] in parameter.opts for parameter in group.params)
        return
    if arguments and arguments[0] in group.commands:
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    else:
        group.make_context("vptq", arguments)
