"""`vptq compare DIR DIR ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vptq.cli.console import (
    check_json_file,
    check_picture_file,
    output,
    plain_table,
    print_warning,
    write_json_file,
    write_picture,
)
from vptq.cli.options import FiguresOption
from vptq.cli.progress import waiting

if TYPE_CHECKING:
    from vptq.evaluate.compare import Folder


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR ...", help="Quantized folders.")],
    picture: Annotated[Path, typer.Option("--output", "-o", help="The picture (PNG) to draw.")] = Path("compare.png"),
    json_file: FiguresOption = None,
) -> None:
    """Show bits against perplexity, divergence and speed.

    Figures are read from report.json, eval.json and bench.json in each folder; the last two are where `vptq eval` and
    `vptq bench` put them with --json.
    """
    check_json_file(json_file)
    check_picture_file(picture, "--output")
    with waiting("reading"):
        from vptq.evaluate.compare import compare as read_folders
        from vptq.evaluate.plot import draw_comparison

        found = read_folders(folders)
        png = draw_comparison(found)
    for folder in found:
        if folder.missing:
            print_warning(f"{folder.name}: {'; '.join(folder.missing)}")
    output().print(_table(found))
    write_picture(png, picture, "--output")
    if json_file is not None:
        write_json_file({"folders": [folder.to_dict() for folder in found]}, json_file)


def _table(folders: list[Folder]) -> Table:
    from vptq.evaluate.compare import original_of

    perplexity, speed = original_of(folders)
    rows: list[tuple[Any, ...]] = [
        (folder.spec, folder.bits, folder.perplexity, folder.kl_divergence, folder.tokens_per_second)
        for folder in folders
    ]
    names = [folder.name for folder in folders]
    if perplexity is not None or speed is not None:
        names, rows = [*names, "original"], [*rows, ("", None, perplexity, None, speed)]
    forms = {"spec": "", "bits": ".3f", "perplexity": ".3f", "KL": ".4f", "tokens/s": ".2f"}
    table = plain_table("folder", *forms)
    for name, row in zip(names, rows, strict=True):
        cells = zip(row, forms.values(), strict=True)
        table.add_row(name, *("" if value is None else format(value, form) for value, form in cells))
    return table
