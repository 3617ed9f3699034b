"""`vptq info DIR --indices`: how often each centroid is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from vptq.cli.console import by_number, output, plain_table, write_picture
from vptq.cli.progress import waiting

if TYPE_CHECKING:
    from vptq.index_use import CodebookUse

# Dead entries that a row lists by number.
LISTED = 4


def show_index_use(folder: Path, picture: Path | None) -> None:
    """Print the table of a quantized folder's codebooks, and draw it if asked to.

    Raises:
        CheckpointError: The folder is damaged.
        ConfigError: The picture cannot be written.
    """
    with waiting("counting indices"):
        from vptq.checkpoint import Checkpoint
        from vptq.index_use import codebook_uses

        uses = sorted(codebook_uses(Checkpoint.open(folder)), key=lambda use: by_number(use.layer))
    console = output()
    console.print(_table(uses))
    console.print()
    dead = [use for use in uses if use.dead]
    entries = sum(use.counts.numel() for use in uses)
    layers = len({use.layer for use in dead})
    console.print(
        f"{sum(len(use.dead) for use in dead):,} of {entries:,} entries are dead, in {layers} of "
        f"{len({use.layer for use in uses})} layers."
    )
    if picture is not None:
        with waiting("drawing"):
            from vptq.evaluate.plot import draw_index_use

            png = draw_index_use(uses, f"How often centroids are used: {folder.resolve().name}")
        write_picture(png, picture, "--picture")


def _table(uses: list[CodebookUse]) -> Table:
    # Columns that are empty in every row only take room away from the names.
    some_dead = any(use.dead for use in uses)
    table = plain_table(
        "layer", "codebook", "entries", "entropy", "most used", *(("dead", "which") if some_dead else ())
    )
    for use in uses:
        dead = use.dead
        cells = [use.codebook, f"{use.counts.numel():,}", f"{use.entropy:.2f} of {use.index_bits:g}"]
        cells.append(f"{use.counts.max().item():,} x")
        cells += [f"{len(dead):,}" if dead else "", _listed(dead, use.counts.shape[0])] if some_dead else []
        table.add_row(use.layer, *cells)
    return table


def _listed(dead: list[tuple[int, int]], groups: int) -> str:
    names = [str(centroid) if groups == 1 else f"{group}:{centroid}" for group, centroid in dead[:LISTED]]
    return ", ".join(names) + (", ..." if len(dead) > LISTED else "")
