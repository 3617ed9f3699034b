"""Pictures of folders compared, and of how often centroids are used.

Imports matplotlib at the top, so only the commands that draw import this module, when they do. Colors and the rest of
the style are those of report.png.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from vptq.evaluate.compare import Folder, original_of
from vptq.quantize.plot import COLORS, INK, MARKERS, METADATA

if TYPE_CHECKING:
    from vptq.index_use import CodebookUse

# Use of an entry beside that of all alike: what is farther out has the color of the end.
RANGE = (1 / 8, 8)
RANK_BINS = 128
DEAD = "#D55E00"
NAMED_LAYERS = 40


def draw_comparison(folders: Sequence[Folder]) -> bytes:
    """Draw bits against what is known of perplexity, divergence and speed.

    Args:
        folders: At least one of them has at least one of the three.

    Returns:
        A PNG file's bytes.
    """
    perplexity, speed = original_of(folders)
    panels = [
        ("perplexity, lower is better", [folder.perplexity for folder in folders], perplexity),
        ("KL to the original (nats), lower is better", [folder.kl_divergence for folder in folders], None),
        ("tokens/s, higher is better", [folder.tokens_per_second for folder in folders], speed),
    ]
    panels = [panel for panel in panels if any(value is not None for value in panel[1])]
    figure = Figure(figsize=(1 + 4.2 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, values, original) in zip(
        figure.subplots(1, len(panels), sharex=True, squeeze=False)[0], panels, strict=True
    ):
        _draw_points(axes, folders, values)
        if original is not None:
            axes.axhline(original, color=INK, linewidth=1, linestyle="--", label="original", zorder=1)
        # A perplexity of 0 means nothing; half the divergence or the speed does.
        known = [value for value in (*values, original) if value is not None]
        _style(axes, known, from_zero=not title.startswith("perplexity"))
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("stored bits per weight")
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    # About ten characters an inch, and six for the mark before each name.
    columns = max(1, min(len(entries), int(figure.get_figwidth() * 10 / (6 + max(map(len, entries))))))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return _png(figure)


def _draw_points(axes: Axes, folders: Sequence[Folder], values: Sequence[float | None]) -> None:
    for index, (folder, value) in enumerate(zip(folders, values, strict=True)):
        if value is not None:
            color, marker = COLORS[index % len(COLORS)], MARKERS[(index + index // len(COLORS)) % len(MARKERS)]
            axes.plot(
                [folder.bits], [value], marker, label=folder.name, color=color, markersize=9, clip_on=False, mec="white"
            )
            axes.annotate(
                f"{value:.3g}", (folder.bits, value), (8, 4), textcoords="offset points", fontsize=8.5, color=INK
            )


def _style(axes: Axes, values: list[float], from_zero: bool) -> None:
    if min(values) > 0 and max(values) / min(values) > 4:
        axes.set_yscale("log")
        number = FuncFormatter(lambda value, _: f"{value:.3g}")
        axes.yaxis.set_major_formatter(number)
        axes.yaxis.set_minor_formatter(number if max(values) / min(values) < 30 else NullFormatter())
    else:
        axes.set_ylim(0 if from_zero else None, max(values) + 0.08 * (max(values) - (0 if from_zero else min(values))))
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(which="both", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def draw_index_use(uses: Sequence[CodebookUse], title: str) -> bytes:
    """Draw how often each centroid is used: a row for each layer, its entries from the most used to the least.

    Args:
        uses: Codebooks of one model.
        title: What to write above.

    Returns:
        A PNG file's bytes.
    """
    kinds = [kind for kind in ("main", "residual", "outlier") if any(use.codebook == kind for use in uses)]
    # The same matrix of each block side by side: they are alike, and one that is not stands out.
    layers = sorted(dict.fromkeys(use.layer for use in uses), key=_matrix)
    found = {(use.layer, use.codebook): use for use in uses}
    height = min(max(3.2, 1.6 + 0.16 * len(layers)), 11)
    figure = Figure(figsize=(3.5 + 4.2 * len(kinds), height), layout="constrained")
    FigureCanvasAgg(figure)
    # Beside each ranking how many entries are dead, where any are.
    widths = [4, 1] if any(use.dead for use in uses) else [4]
    panels = figure.subplots(
        *(1, len(widths) * len(kinds)), sharey=True, width_ratios=widths * len(kinds), squeeze=False
    )[0]
    for index, kind in enumerate(kinds):
        rows = [found.get((layer, kind)) for layer in layers]
        ranks, *beside = panels[len(widths) * index : len(widths) * (index + 1)]
        image = _draw_ranks(ranks, rows)
        for axes in beside:
            _draw_dead(axes, rows)
        dead = sum(len(use.dead) for use in rows if use is not None)
        entries = sum(use.counts.numel() for use in rows if use is not None)
        ranks.set_title(f"{kind} codebook: {dead:,} of {entries:,} entries dead", loc="left", fontsize=10)
    _label_layers(panels, layers)
    bar = figure.colorbar(image, ax=panels, extend="both", pad=0.01, fraction=0.03)
    bar.set_ticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("times as often as if all were used alike (orange: never)", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    return _png(figure)


def _draw_ranks(axes: Axes, rows: Sequence[CodebookUse | None]) -> AxesImage:
    grid = np.ma.masked_invalid([np.full(RANK_BINS, np.nan) if use is None else _by_rank(use) for use in rows])
    colors = colormaps["viridis"].with_extremes(bad="#EEEEEE", under=DEAD)  # bad: layers without such a codebook
    extent = (0, 100, len(rows), 0)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap=colors, norm=LogNorm(*RANGE), extent=extent)
    axes.set_xlabel("entries, most used first (%)", fontsize=9)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    return image


def _by_rank(use: CodebookUse) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Use relative to the mean in each of `RANK_BINS` parts of the ranking; dead parts are below `RANGE`."""
    ranked = np.sort(use.counts.double().flatten().numpy())[::-1]
    edges = np.linspace(0, len(ranked), RANK_BINS + 1).astype(int)
    parts = [ranked[low : max(low + 1, high)] for low, high in pairwise(edges)]
    return np.array([(part.mean() / ranked.mean()).clip(*RANGE) if part.any() else RANGE[0] / 2 for part in parts])


def _draw_dead(axes: Axes, rows: Sequence[CodebookUse | None]) -> None:
    dead = [0 if use is None else len(use.dead) for use in rows]
    axes.barh(np.arange(len(rows)) + 0.5, dead, height=0.9, color=DEAD)
    axes.set_xlim(0, max(1, *dead) * 1.1)
    axes.xaxis.set_major_locator(MaxNLocator(2, integer=True) if any(dead) else NullLocator())
    axes.set_xlabel("dead" if any(dead) else "none dead", fontsize=9)
    axes.tick_params(axis="x", colors=INK, labelsize=8.5)
    axes.tick_params(axis="y", left=False)
    axes.spines[["top", "right"]].set_visible(False)


def _label_layers(panels: Sequence[Axes], layers: Sequence[str]) -> None:
    """Every layer's name where there is room for it; otherwise that of the matrix, once for all its blocks."""
    axes = panels[0]
    if len(layers) <= NAMED_LAYERS:
        axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
        return
    groups = [(kind, len(list(group))) for kind, group in groupby(layers, key=_matrix)]
    ends = np.cumsum([count for _, count in groups])
    starts = np.array([0, *ends[:-1]])
    axes.set_yticks((starts + ends) / 2, [kind for kind, _ in groups], fontsize=9)
    axes.set_ylabel("layers, in each kind from the first block down", fontsize=9)
    for panel in panels:
        for end in ends[:-1]:
            panel.axhline(end, color="white", linewidth=1.5)


def _matrix(layer: str) -> str:
    """The last part of a layer's path, such as q_proj: what the same matrix is called in each block."""
    return layer.rpartition(".")[2]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata=METADATA)
    return buffer.getvalue()
