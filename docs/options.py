"""The command line's options as Markdown tables, read from the program itself: docs/knobs.md cannot fall behind it.

A page says with a marker which options follow:

    <!-- options quantize plan: --bits --size -->   these options, and which of the commands have them
    <!-- options eval -->                           all options of a command; `vptq` is the program without one
    <!-- options others -->                         every command that the page does not name, under a heading each
"""

from __future__ import annotations

import re
from typing import Any

import typer
from grid import table

from vptq.cli import app

PROGRAM = "vptq"
OTHERS = "others"
_GROUP: Any = typer.main.get_command(app)
_COMMANDS: dict[str, Any] = {PROGRAM: _GROUP, **_GROUP.commands}
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
    if unknown := set(names.split()) - _COMMANDS.keys():
        raise ValueError(f"options of {', '.join(sorted(unknown))}: vptq has no such command")
    return _table(names.split(), flags.split() or None)


def check_complete(page: str) -> None:
    """Raises ValueError where an option of a command that the page names is in none of its tables."""
    shown: dict[str, set[str]] = {}
    for words in _MARKER.findall(page):
        names, _, flags = words.partition(":")
        for name in names.split() if words != OTHERS else _unnamed(page):
            shown.setdefault(name, set()).update(flags.split() or _options(name))
    for name in _COMMANDS:
        if missing := sorted(_options(name).keys() - shown.get(name, set())):
            raise ValueError(f"{', '.join(missing)} of vptq {name} is in none of the page's tables")


def _unnamed(page: str) -> list[str]:
    named = {name for words in _MARKER.findall(page) for name in words.partition(":")[0].split()}
    return [name for name in _COMMANDS if name not in named]


def _options(command: str) -> dict[str, Any]:
    """A command's options by their longest name."""
    found = [option for option in _COMMANDS[command].params if option.param_type_name == "option"]
    return {max(option.opts, key=len): option for option in found if not option.hidden}


def _about(command: str) -> str:
    return str(_COMMANDS[command].help).strip().partition("\n")[0]


def _table(commands: list[str], flags: list[str] | None = None) -> str:
    """Rows of the options named, or of all; with several commands a column says which of them have it."""
    rows = []
    for flag in flags if flags is not None else _options(commands[0]):
        having = [name for name in commands if flag in _options(name)]
        if not having:
            raise ValueError(f"no command of {', '.join(commands)} has an option {flag}")
        option = _options(having[0])[flag]
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
