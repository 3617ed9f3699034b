"""`vptq chat MODEL`: converse with a model on the terminal, or through a pipe.

On a terminal GNU readline edits the line and remembers earlier ones (it comes with Python, and nothing else needs to be
installed), and Ctrl-C stops an answer, not the program. Elsewhere every line read is a question, standard output has
the answers and nothing else, and Ctrl-C ends the program as it does everywhere.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vptq.cli.chat_commands import is_command, run_command
from vptq.cli.console import file_size, messages, output, print_error, print_warning
from vptq.cli.loading import load
from vptq.cli.options import CodebookFormOption, DeviceOption, DtypeOption, ModelArgument, TokenizerOption
from vptq.cli.wrapping import WordWrap
from vptq.errors import VPTQError

if TYPE_CHECKING:
    from vptq.conversation import Answer, Conversation

# What ends a conversation; an empty line does so since the published package.
ENDS = ("", "exit")
# A model may say anything, but escape sequences would let it paint over the terminal.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    model: ModelArgument,
    tokenizer: TokenizerOption = "",
    system: Annotated[
        str, typer.Option("--system", help="What the model is told before the conversation.", show_default=False)
    ] = "",
    codebook_form: CodebookFormOption = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Converse with a model, on the terminal or a pipe.

    Lines that begin with a slash are commands: /help lists them. An empty line ends it.
    """
    loaded = load(model, tokenizer, device, "auto" if dtype is None else dtype.value, codebook_form)
    from vptq.conversation import Conversation

    converse(Conversation(*loaded, system))


def converse(conversation: Conversation) -> None:
    """Answer lines from standard input until one ends the conversation, or the input ends."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if not conversation.has_template:
        print_warning("the tokenizer has no chat template: each line is continued as it is, without those before it")
    if interactive:
        messages().print("/help lists the commands; an empty line ends the conversation.", style="dim")
    for line in _typed_lines() if interactive else _piped_lines():
        try:
            if is_command(line):
                run_command(conversation, line)
            else:
                _take_turn(conversation, line, interactive)
        except VPTQError as error:
            print_error(str(error))
        except EOFError:
            return


def _typed_lines() -> Iterator[str]:
    """Lines from the keyboard, with history and the keys that edit. Ctrl-C drops a line, Ctrl-D ends them."""
    with suppress(ImportError):  # a Python built without it still reads lines
        import readline  # noqa: F401  (importing it is what makes input() edit)
    # Between \1 and \2 is what readline must not count as width.
    prompt = "You: " if output().color_system is None else "\1\033[1m\2You: \1\033[0m\2"
    while True:
        try:
            line = input(prompt).strip()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        except EOFError:
            sys.stdout.write("\n")
            return
        if line in ENDS:
            return
        yield line


def _piped_lines() -> Iterator[str]:
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # bytes that are no UTF-8 are the sender's trouble, not a reason to stop
    for line in map(str.strip, sys.stdin):
        if line in ENDS:
            return
        yield line


def _take_turn(conversation: Conversation, question: str, interactive: bool) -> None:
    from vptq.generation import WORDLESS

    console = output()
    wrap = WordWrap(console.width) if interactive and not console.is_dumb_terminal else None

    def show(text: str) -> None:
        text = text.translate(_CONTROL) if interactive else text
        sys.stdout.write(wrap.feed(text) if wrap else text)
        sys.stdout.flush()

    if not interactive:
        answer = conversation.ask(question, show)
    else:
        try:
            with _stopped_by_interrupt() as stop:
                answer = conversation.ask(question, show, stop.is_set)
        except KeyboardInterrupt:
            show("\n")
            messages().print("Stopped; the question is taken back.", style="dim")
            return
    wordless = not answer.text and answer.finish.reason == "stop"
    if not (wordless and interactive):  # who reads a pipe counts lines
        show("\n")
    if wordless:
        messages().print(f"{WORDLESS}.", style="yellow", soft_wrap=True)
    if answer.forgotten_turns:
        turns = "turn" if answer.forgotten_turns == 1 else "turns"
        messages().print(
            f"The context of {conversation.context:,} tokens is full: the oldest {answer.forgotten_turns} {turns} "
            "went out of the model's sight before this answer.",
            style="yellow",
            soft_wrap=True,
        )
    messages().print(_status(answer, conversation), style="dim", soft_wrap=True)


@contextmanager
def _stopped_by_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that the answer ends after a whole token; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def on_interrupt(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _status(answer: Answer, conversation: Conversation) -> str:
    from vptq.evaluate.memory import peak_memory_bytes

    of_context = "" if conversation.context is None else f" of {conversation.context:,}"
    finish = answer.finish
    parts = [
        *(["stopped"] if finish.reason == "given up" else []),
        *(["cut at max_new_tokens or the end of the context"] if finish.reason == "length" else []),
        finish.length,
        *([f"{finish.tokens_per_second:.1f} tokens/s"] if finish.tokens_per_second else []),
        f"first after {finish.first_token_seconds:.2f} s",
        f"context {finish.prompt_tokens + finish.tokens:,}{of_context}",
        f"memory {file_size(peak_memory_bytes(conversation.model.device))}",
    ]
    return " | ".join(parts)
