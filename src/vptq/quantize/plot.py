"""report.png: proxy loss by depth, by kind of module, and by stage.

Imports matplotlib at the top, so only `vptq.quantize.report` imports this module, and only when a report is saved. The
figure is drawn on a canvas of its own: pyplot would keep global state and look for a display.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from vptq.quantize.report import LayerReport, Report, is_drawable

# Okabe and Ito's palette, told apart by readers with any kind of color vision, here and on paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800")
MARKERS = "osD^vPX*"
INK = "#333333"
# matplotlib stamps its version into the file otherwise, and the same seed is to give the same bytes.
METADATA = {"Software": None}


def draw_report(report: Report) -> bytes:
    """Draw a report.

    Args:
        report: What to draw; layers without a finite positive loss are left out.

    Returns:
        A PNG file's bytes.
    """
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_depth, by_stage = figure.subplots(1, 2, width_ratios=(3, 2))
    kinds = _by_kind(report.layers)
    _draw_depth(by_depth, kinds)
    _draw_stages(by_stage, kinds, list(report.mean_losses))
    for axes in (by_depth, by_stage):
        _style(axes)
    handles, labels = by_depth.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False, fontsize=9)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=12, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata=METADATA)
    return buffer.getvalue()


def _title(report: Report) -> str:
    loss = "" if math.isnan(report.mean_loss) else f", mean proxy loss {report.mean_loss:.2%}"
    what = f"a budget of {report.budget}" if report.budget else report.spec
    return f"{report.model} at {what}: {report.bits_per_weight:.2f} bits per weight{loss}"


def _by_kind(layers: list[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers by the last part of their path, such as q_proj: what the same matrix does in each block."""
    kinds: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in layers:
        kinds[layer.name.rpartition(".")[2]].append(layer)
    return dict(kinds)


def _block_of(layer: LayerReport) -> int:
    """Index of the decoder block: the first number in the path (a later one is an expert's)."""
    return next((int(part) for part in layer.name.split(".") if part.isdigit()), 0)


def _draw_depth(axes: Axes, kinds: dict[str, list[LayerReport]]) -> None:
    for index, (kind, layers) in enumerate(kinds.items()):
        blocks: dict[int, list[float]] = defaultdict(list)
        for layer in layers:
            if is_drawable(layer.loss):
                blocks[_block_of(layer)].append(layer.loss)
        depths = sorted(blocks)
        axes.plot(
            depths,
            [sum(blocks[depth]) / len(blocks[depth]) for depth in depths],
            label=kind,
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
        )
    axes.set_title("after the last stage, by decoder block", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("proxy loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_stages(axes: Axes, kinds: dict[str, list[LayerReport]], stages: list[str]) -> None:
    for index, layers in enumerate(kinds.values()):
        points = []
        for position, stage in enumerate(stages):
            losses = [layer.losses[stage] for layer in layers if is_drawable(layer.losses.get(stage, math.nan))]
            if losses:
                points.append((position, sum(losses) / len(losses)))
        axes.plot(
            [position for position, _ in points],
            [loss for _, loss in points],
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.2,
        )
    axes.set_title("mean over blocks, by stage", loc="left", fontsize=10, color=INK)
    axes.set_xticks(range(len(stages)), stages)
    axes.set_xlim(-0.3, len(stages) - 0.7)


def _style(axes: Axes) -> None:
    axes.set_yscale("log")
    percent = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
    axes.yaxis.set_major_formatter(percent)
    low, high = axes.get_ylim()
    # Within one decade a log axis has a single labelled tick; label the ones between as well.
    axes.yaxis.set_minor_formatter(percent if high / low < 30 else NullFormatter())
    axes.grid(axis="y", which="both", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
