"""`vptq eval DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vptq.cli.console import (
    check_json_file,
    facts,
    output,
    plain_table,
    write_json_file,
)
from vptq.cli.options import DeviceOption, DtypeOption, FiguresOption, ModelArgument, SeqlenOption
from vptq.cli.progress import Form, ProgressOption, QuietOption, working

if TYPE_CHECKING:
    from vptq.evaluate import Estimate, Evaluation


def evaluate(
    model: ModelArgument,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The original model, to compare with and measure divergence from.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="<str>",
            help="A text file, wikitext2, c4, or a hub data set NAME[:CONFIG][@SPLIT]; give it again for more texts."
            "  [default: wikitext2, or none with --tasks]",
        ),
    ] = None,
    seqlen: SeqlenOption = 2048,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Windows of each text, from its beginning.  [default: all]")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Zero-shot tasks by their names in lm-eval, commas between: hellaswag,piqa."),
    ] = None,
    task_dir: Annotated[
        Path | None,
        typer.Option("--task-dir", help="Folder with lm-eval task files (YAML) of your own; code they name is run."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Examples of each task, from its beginning.  [default: all]")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests of tasks to run at once.")] = 8,
    remember: Annotated[
        bool, typer.Option("--remember", help="Keep what --reference predicts, for other models and the same text.")
    ] = False,
    json_file: FiguresOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    progress: ProgressOption = Form.auto,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity, divergence and zero-shot tasks."""
    check_json_file(json_file)
    task_names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not task_names:
        raise typer.BadParameter("it names no task", param_hint="--tasks")
    with working(progress, quiet) as shown:
        from vptq.evaluate import evaluate as evaluate_model

        result = evaluate_model(
            model,
            reference,
            text or None,
            seqlen,
            windows,
            tasks=task_names,
            task_dir=task_dir,
            limit=limit,
            batch_size=batch_size,
            remember=remember,
            device=device,
            dtype="auto" if dtype is None else dtype.value,
            progress=shown,
        )
        for scores in result.texts:
            if scores.seqlen < seqlen:
                shown.warn(
                    f"text {scores.text} has only {scores.seqlen} tokens, less than one window of {seqlen}; used those"
                )
    _print_result(result)
    if json_file is not None:
        write_json_file(result.to_dict(), json_file)


def _print_result(result: Evaluation) -> None:
    console = output()
    names = {"model": result.model} | ({"original": result.reference} if result.reference is not None else {})
    console.print(facts(names))
    for table in ([_text_table(result)] if result.texts else []) + ([_task_table(result)] if result.tasks else []):
        console.print()
        console.print(table)
    console.print(f"{result.seconds:.1f} s", style="dim")


def _text_table(result: Evaluation) -> Table:
    compared = ("original's", "KL to original (nats)", "same top token") if result.reference is not None else ()
    table = plain_table("text", "windows", "perplexity", *compared)
    for scores in result.texts:
        row = [scores.text, f"{scores.windows} x {scores.seqlen}", f"{scores.perplexity:.4f}"]
        if result.reference is not None:
            row += [f"{scores.reference_perplexity:.4f}", f"{scores.kl_divergence:.5f}", f"{scores.same_top_token:.2%}"]
        table.add_row(*row)
    return table


def _task_table(result: Evaluation) -> Table:
    table = plain_table("task", "examples", "", "model", *(("original",) if result.reference is not None else ()))
    for scores in result.tasks:
        for metric, estimate in scores.metrics.items():
            row = [scores.task, f"{scores.examples:,}", metric, _with_error(estimate)]
            if scores.reference_metrics is not None:
                row.append(_with_error(scores.reference_metrics[metric]))
            table.add_row(*row)
    return table


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.value:.4f}" + ("" if estimate.stderr is None else f" ± {estimate.stderr:.4f}")
