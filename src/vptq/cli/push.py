"""`vptq push DIR REPO`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vptq.cli.console import facts, file_size, output, plain_table
from vptq.cli.progress import Form, ProgressOption, QuietOption, working


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to: USER/NAME, or NAME for one of yours.")],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see a repository that is made for this.  [default: private]")
    ] = False,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval", help="What `vptq eval --json` wrote, for the model card.  [default: DIR/eval.json if it is there]"
        ),
    ] = None,
    base_model: Annotated[
        str,
        typer.Option(
            "--base-model", help="Hub id of the original.  [default: what it was quantized from]", show_default=False
        ),
    ] = "",
    license: Annotated[
        str,
        typer.Option("--license", help="The original's license.  [default: as the hub says]", show_default=False),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
    progress: ProgressOption = Form.auto,
    quiet: QuietOption = False,
) -> None:
    """Publish a quantized folder on the Hugging Face hub.

    The folder is checked first: it must be complete, and readable in the format. Its model card is written anew, with
    the bits that its tensors have, how it was made, and what was measured. The token is HF_TOKEN's, or that of
    `hf auth login`.
    """
    with working(progress, quiet, "reading the folder") as shown:
        from vptq.publish import prepare, upload

        publication = prepare(folder, repo, evaluation, base_model, license, shown)
        for warning in publication.warnings:
            shown.warn(warning)
        url = None if dry_run else upload(publication, public, shown)
    table = plain_table("file", "size")
    for name, size in publication.sizes.items():
        table.add_row(name, file_size(size))
    console = output()
    if dry_run:
        console.print(table)
        console.print()
    total = f"{len(publication.sizes)} files, {file_size(sum(publication.sizes.values()))}"
    bits = f"{publication.bits_per_weight:.3f}"
    where = {"nothing was sent to": repo} if url is None else {"published": url}
    console.print(facts({**where, "files": total, "bits per weight": bits}))
