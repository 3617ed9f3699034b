"""`vptq bench DIR`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vptq.cli.console import (
    check_json_file,
    facts,
    file_size,
    output,
    plain_table,
    write_json_file,
)
from vptq.cli.options import CodebookFormOption, DeviceOption, DtypeOption, FiguresOption, ModelArgument
from vptq.cli.progress import Form, ProgressOption, QuietOption, working

if TYPE_CHECKING:
    from vptq.evaluate.throughput import Speed, Throughput


def bench(
    model: ModelArgument,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The original model, to run in turns with the other.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to generate after it.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed runs of each; medians are shown.")] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of the CPU.  [default: one a core]")
    ] = None,
    codebook_form: CodebookFormOption = "",
    json_file: FiguresOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    progress: ProgressOption = Form.auto,
    quiet: QuietOption = False,
) -> None:
    """Measure speed and memory of generating text."""
    check_json_file(json_file)
    with working(progress, quiet) as shown:
        from vptq.evaluate.throughput import measure_throughput

        result = measure_throughput(
            model,
            reference,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            device=device,
            dtype="auto" if dtype is None else dtype.value,
            codebook_form=codebook_form,
            progress=shown,
        )
    _print_result(result)
    if json_file is not None:
        write_json_file(result.to_dict(), json_file)


def _print_result(result: Throughput) -> None:
    console = output()
    names = {"model": result.model.model}
    names |= {} if result.reference is None else {"original": result.reference.model}
    threads = f", {result.threads} thread{'' if result.threads == 1 else 's'}" if result.device == "cpu" else ""
    names |= {
        "on": f"{result.device}{threads}, {file_size(result.bandwidth_bytes_per_second)}/s of memory bandwidth",
        "runs": f"{result.prompt_tokens} + {result.new_tokens} tokens, median of {result.rounds}",
    }
    console.print(facts(names))
    console.print()
    columns = [_column(speed) for speed in (result.model, result.reference) if speed is not None]
    table = plain_table("", *("model", "original")[: len(columns)])
    for what in columns[0]:
        table.add_row(what, *(column[what] for column in columns))
    console.print(table)


def _column(speed: Speed) -> dict[str, str]:
    return {
        "float type": speed.dtype,
        "time to first token": f"{speed.first_token_seconds:.3f} s",
        "prefill": f"{speed.prefill_tokens_per_second:.1f} tokens/s",
        "decode": f"{speed.decode_tokens_per_second:.2f} tokens/s",
        "peak memory": file_size(speed.peak_memory_bytes),
        "bytes per token": file_size(speed.bytes_per_token),
        "bound by bandwidth": f"{speed.bound_tokens_per_second:.2f} tokens/s",
        "share of the bound": f"{speed.share_of_bound:.1%}",
    }
