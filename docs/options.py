"""The command line's options as Markdown tables, read from the program itself: docs/knobs.md cannot fall behind it.

A page says with a marker which options follow:

    <!-- options quantize plan: --bits --size -->   these options, and which of the commands have them
    <!-- options quantize plan: rest -->            those that no other table of the page shows
    <!-- options eval -->                           all options of a command; `vptq` is the program without one
    <!-- options others -->                         every command that the page does not name, under a heading each
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import typer
from grid import table

from vptq.cli import app

PROGRAM = "vptq"
OTHERS = "others"
REST = "rest"
_GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {PROGRAM: _GROUP, **_GROUP.commands}
_MARKER = re.compile(r"<!-- options (.+?) -->")
_STATED_DEFAULT = re.compile(r"\s*\[default([^:]*): (.+)\]$")


def render(words: str, page: str) -> str:
    """What belongs behind the marker `<!-- options WORDS -->` of a page.

    Raises:
        ValueError: It names a command or an option that the program does not have.
    """
    if words == OTHERS:
        return "\n\n".join(f"### {PROGRAM} {name}\n\n{_about(name)}\n\n{_table([name])}" for name in _unnamed(page))
    names, _, flags = words.partition(":")
    commands = names.split()
    if unknown := set(commands) - COMMANDS.keys():
        raise ValueError(f"options of {', '.join(sorted(unknown))}: vptq has no such command")
    return _table(commands, _rest(commands, page) if flags.strip() == REST else flags.split() or None)


def options_of(command: str) -> dict[str, Any]:
    """A command's options by their longest name."""
    found = [option for option in COMMANDS[command].params if option.param_type_name == "option"]
    return {max(option.opts, key=len): option for option in found if not option.hidden}


def _rest(commands: Iterable[str], page: str) -> list[str]:
    shown: dict[str, set[str]] = {}
    for names, _, flags in (words.partition(":") for words in _MARKER.findall(page)):
        for name in names.split():
            shown.setdefault(name, set()).update(flags.split())
    left = [flag for name in commands for flag in options_of(name) if flag not in shown.get(name, set())]
    return list(dict.fromkeys(left))


def _unnamed(page: str) -> list[str]:
    named = {name for words in _MARKER.findall(page) for name in words.partition(":")[0].split()}
    return [name for name in COMMANDS if name not in named]


def _about(command: str) -> str:
    return str(COMMANDS[command].help).strip().partition("\n")[0]


def _table(commands: list[str], flags: Iterable[str] | None = None) -> str:
    """Rows of the options named, or of all; with several commands a column says which of them have it."""
    rows = []
    for flag in options_of(commands[0]) if flags is None else flags:
        having = [name for name in commands if flag in options_of(name)]
        if not having:
            raise ValueError(f"no command of {', '.join(commands)} has an option {flag}")
        option = options_of(having[0])[flag]
        help_text = _STATED_DEFAULT.sub("", option.help or "").replace("|", "\\|").replace("<", "\\<")
        names = ", ".join(f"`{name}`" for name in [*sorted(option.opts, key=len), *option.secondary_opts])
        rows.append([names, _default(option), help_text, *([", ".join(having)] if len(commands) > 1 else [])])
    heading = ["option", "default", "", *(["commands"] if len(commands) > 1 else [])]
    return table([heading, *rows]) if rows else "It has no options."


def _default(option: Any) -> str:
    if stated := _STATED_DEFAULT.search(option.help or ""):
        return stated[2] + stated[1]
    if option.required:
        return "required"
    value = getattr(option.default, "value", option.default)
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, "") else f"`{value}`"
