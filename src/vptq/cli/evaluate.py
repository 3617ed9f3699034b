"""`vptq eval DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vptq.cli.console import messages, output, plain_table, print_warning, quiet_transformers
from vptq.cli.options import DeviceOption, DtypeOption, SeqlenOption
from vptq.errors import ConfigError

if TYPE_CHECKING:
    from vptq.evaluate import Evaluation


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A quantized folder, or any hub id, local folder or GGUF file.")
    ],
    reference: Annotated[
        str | None, typer.Option("--reference", help="The original model, to measure the divergence from.")
    ] = None,
    text: Annotated[
        str, typer.Option("--text", help="A text file, wikitext2, c4, or a hub data set NAME[:CONFIG][@SPLIT].")
    ] = "wikitext2",
    seqlen: SeqlenOption = 2048,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Windows of the text, from its beginning.  [default: all]")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Measure perplexity, and the divergence from the original."""
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ConfigError(f"--json {json_file} is no file in a folder that exists; choose another")
    quiet_transformers()
    from vptq.evaluate import evaluate as evaluate_model

    with _bar() as bar:
        task = bar.add_task("loading", total=None)
        result = evaluate_model(
            model,
            reference,
            text,
            seqlen,
            windows,
            device=device,
            dtype="auto" if dtype is None else dtype.value,
            progress=lambda done, total: bar.update(task, description="evaluating", completed=done, total=total),
        )
    if result.seqlen < seqlen:
        print_warning(f"text {text} has only {result.seqlen} tokens, less than one window of {seqlen}; used those")
    _print_result(result)
    if json_file is not None:
        _write_json(result, json_file)


def _bar() -> Progress:
    console = messages()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _print_result(result: Evaluation) -> None:
    table = plain_table("", "perplexity", "KL to original (nats)", "same top token")
    if result.reference is not None:
        table.add_row(result.reference, f"{result.reference_perplexity:.4f}", "", "")
    divergence = "" if result.kl_divergence is None else f"{result.kl_divergence:.5f}"
    same_top = "" if result.same_top_token is None else f"{result.same_top_token:.2%}"
    table.add_row(result.model, f"{result.perplexity:.4f}", divergence, same_top)
    console = output()
    console.print(table)
    console.print(
        f"{result.text}: {result.windows} windows of {result.seqlen} tokens in {result.seconds:.1f} s", style="dim"
    )


def _write_json(result: Evaluation, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write --json {path}: {error.strerror}") from error
