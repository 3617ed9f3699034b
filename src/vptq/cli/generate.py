"""`python -m vptq --model DIR --prompt ...` and `--chat`: talk to a model on the terminal.

The options and their defaults are those of the published package, so that its users' scripts go on working; `--model`
takes any model that transformers loads, quantized or not, which makes comparing the two one word.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vptq.cli.console import messages, output, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPLETION_TOKENS = 100
REPLY_TOKENS = 500

Message = dict[str, str]


def generate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model", help="A quantized folder, or any hub id, local folder or GGUF file.", show_default=False
        ),
    ] = "",
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="Where the tokenizer is.  [default: with the model]", show_default=False)
    ] = "",
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")] = "once upon a time, there ",
    chat: Annotated[bool, typer.Option("--chat", help="Converse; an empty line or 'exit' ends it.")] = False,
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
    quiet_transformers()
    from vptq.model import AutoModelForCausalLM
    from vptq.source import load_tokenizer

    token = os.environ.get("HF_TOKEN") or None
    loaded_tokenizer = load_tokenizer(tokenizer or model, token=token)
    loaded_model = AutoModelForCausalLM.from_pretrained(
        model, device_map="auto", token=token, codebook_form=codebook_form
    )
    if chat and not loaded_tokenizer.chat_template:
        messages().print("The tokenizer has no chat template: continuing --prompt instead.", style="yellow")
        chat = False
    if chat:
        converse(loaded_model, loaded_tokenizer, chat_system_prompt)
    else:
        complete(loaded_model, loaded_tokenizer, prompt)


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Stream a prompt and its continuation to standard output; return the continuation."""
    return _stream(model, tokenizer, tokenizer(prompt, return_tensors="pt"), COMPLETION_TOKENS, show_prompt=True)


def converse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> None:
    """Answer lines from standard input until one is empty or "exit", or the input ends."""
    history: list[Message] = []
    while (question := _ask()) not in ("", "exit"):
        history.append({"role": "user", "content": question})
        inputs = chat_inputs(tokenizer, system_prompt, history)
        reply = _stream(model, tokenizer, inputs, REPLY_TOKENS, do_sample=True)
        history.append({"role": "assistant", "content": reply})


def chat_inputs(tokenizer: PreTrainedTokenizerBase, system_prompt: str, history: list[Message]) -> Any:
    """The conversation as model inputs: input_ids and attention_mask, each [1, tokens].

    Some models' templates know no system role and raise on it (whatever their authors chose to raise); those get the
    system prompt in front of the first question.
    """
    arguments: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        return tokenizer.apply_chat_template([*system, *history], **arguments)
    except Exception:
        if not system:
            raise
        first, *rest = history
        merged = {**first, "content": f"{system_prompt}\n\n{first['content']}"}
        return tokenizer.apply_chat_template([merged, *rest], **arguments)


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    max_new_tokens: int,
    show_prompt: bool = False,
    **settings: Any,
) -> str:
    from transformers import TextStreamer

    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=not show_prompt, skip_special_tokens=True)
    # Models without a padding token make generate() warn; with one sequence at a time the choice has no effect.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Unpacked by name: since transformers 5 a chat template gives the same mapping as the tokenizer does.
    generator: Any = model  # nn.Module.__getattr__ hides the mixin's method from the type checker
    tokens = generator.generate(
        **inputs, streamer=streamer, max_new_tokens=max_new_tokens, pad_token_id=pad, **settings
    )
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _ask() -> str:
    try:
        return output().input("[bold]You:[/bold] ").strip()
    except EOFError:
        return ""
