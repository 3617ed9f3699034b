"""What a line that begins with a slash does in `vptq chat`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vptq.cli.console import facts, messages, write_json_file
from vptq.errors import ConfigError

if TYPE_CHECKING:
    from vptq.conversation import Conversation


def is_command(line: str) -> bool:
    """Whether a line is meant for the program; any other is for the model."""
    return line.startswith("/")


def run_command(conversation: Conversation, line: str) -> None:
    """Do what a line says.

    Raises:
        ConfigError: There is no such command, or it cannot be done.
        EOFError: The command ends the conversation.
    """
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name}; there are {', '.join(COMMANDS)}")
    COMMANDS[name][0](conversation, argument.strip())


def _help(conversation: Conversation, argument: str) -> None:
    messages().print(facts({f"{name} {usage[0]}".strip(): usage[1] for name, (_, *usage) in COMMANDS.items()}))
    messages().print("Ctrl-C stops an answer. The arrow keys bring earlier lines back.", style="dim")


def _reset(conversation: Conversation, argument: str) -> None:
    conversation.reset()
    _say("The conversation is forgotten; system prompt and settings stay.")


def _system(conversation: Conversation, argument: str) -> None:
    if not argument:
        _say(f"The system prompt is: {conversation.system_prompt or '(none)'}")
        return
    conversation.system_prompt = "" if argument == "none" else argument
    _say("The model is told this from the next turn on." if conversation.system_prompt else "No system prompt now.")


def _save(conversation: Conversation, argument: str) -> None:
    path = _path(argument, "/save")
    write_json_file(conversation.to_dict(), path, "/save")
    _say(f"{_turns(conversation)} saved to {path}.")


def _load(conversation: Conversation, argument: str) -> None:
    path = _path(argument, "/load")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read /load {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"/load {path} is no JSON file: {error}") from error
    try:
        conversation.load_dict(data)
    except ConfigError as error:
        raise ConfigError(f"/load {path}: {error}") from error
    _say(f"{_turns(conversation)} loaded from {path}; they go on from here.")


def _params(conversation: Conversation, argument: str) -> None:
    changed = conversation.sampling
    for setting in argument.split():
        changed = changed.changed(setting)
    conversation.sampling = changed
    shown = {name: "the model's own" if value is None else f"{value:g}" for name, value in asdict(changed).items()}
    if changed.seed is None:
        shown["seed"] = "none"
    messages().print(facts(shown))


def _exit(conversation: Conversation, argument: str) -> None:
    raise EOFError


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise ConfigError(f"{command} needs a file, as in {command} conversation.json")
    return Path(argument).expanduser()


def _turns(conversation: Conversation) -> str:
    count = len(conversation.messages) // 2
    return f"{count} turn{'' if count == 1 else 's'}"


def _say(text: str) -> None:
    messages().print(text, style="dim", markup=False, soft_wrap=True)


COMMANDS: dict[str, tuple[Callable[[Conversation, str], None], str, str]] = {
    "/help": (_help, "", "this list"),
    "/reset": (_reset, "", "forget the conversation"),
    "/system": (_system, "[TEXT|none]", "show or change what the model is told before the conversation"),
    "/save": (_save, "FILE", "write the conversation and its settings to a JSON file"),
    "/load": (_load, "FILE", "go on with a conversation that /save wrote"),
    "/params": (_params, "[NAME=VALUE ...]", "show or change how tokens are chosen; NAME= gives it back to the model"),
    "/exit": (_exit, "", "end; so does an empty line"),
}
