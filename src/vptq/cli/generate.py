"""`python -m vptq --model DIR --prompt ...` and `--chat`: talk to a model on the terminal.

The options and their defaults are those of the published package, so that its users' scripts go on working; `--model`
takes any model that transformers loads, quantized or not, which makes comparing the two one word.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vptq.cli.console import messages
from vptq.cli.loading import load
from vptq.cli.options import TokenizerOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPLETION_TOKENS = 100


def generate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model", help="A quantized folder, or any hub id, local folder or GGUF file.", show_default=False
        ),
    ] = "",
    tokenizer: TokenizerOption = "",
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")] = "once upon a time, there ",
    chat: Annotated[bool, typer.Option("--chat", help="Converse, as in `vptq chat`.")] = False,
    chat_system_prompt: Annotated[
        str, typer.Option("--chat-system-prompt", help="What the model is told before the conversation.")
    ] = "you are a math teacher.",
    codebook_form: Annotated[
        str,
        typer.Option(
            "--codebook-form",
            help="int8 rounds codebooks to bytes on CPUs that are faster with them; exact does not.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Quantize language models to 1-4 bits per weight, and run them.

    Without a command: continue --prompt with --model, or --chat with it.
    """
    if context.invoked_subcommand is not None:
        return
    if not model:
        context.fail("Missing option '--model' (to generate text), or a command.")
    loaded_model, loaded_tokenizer = load(model, tokenizer, codebook_form=codebook_form)
    if chat and not loaded_tokenizer.chat_template:
        messages().print("The tokenizer has no chat template: continuing --prompt instead.", style="yellow")
        chat = False
    if chat:
        from vptq.cli.chat import converse
        from vptq.conversation import Conversation

        converse(Conversation(loaded_model, loaded_tokenizer, chat_system_prompt))
    else:
        complete(loaded_model, loaded_tokenizer, prompt)


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Stream a prompt and its continuation to standard output; sampled only where the model's own settings say so."""
    from vptq.generation import generate_text, text_prompt
    from vptq.sampling import Sampling

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    config = model.generation_config
    sampling = Sampling(COMPLETION_TOKENS, temperature=None if config is not None and config.do_sample else 0.0)
    show(prompt)
    generate_text(model, tokenizer, text_prompt(tokenizer, prompt), sampling, show, goes_on=True)
    show("\n")
