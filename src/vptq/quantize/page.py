"""report.html: what a run did to every layer, in one file that any browser shows and nobody has to fetch anything for.

Everything by layer is a map of the model: a column for each decoder block, a row for each kind of matrix. A layer that
went wrong is a spot of another color, and the mouse says its figure. No script: SVG and a few lines of CSS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from vptq.index_use import CodebookUse
from vptq.quantize.report import LayerReport, Report, is_drawable

# Light to dark blue; equal steps of lightness, so that a print in grey says the same.
LIGHT, DARK = (237, 243, 250), (8, 48, 107)
# Of a figure that spans decades, what is more than this many times below the largest is as light as it gets.
MOST_TIMES = 50
CELL, ROW, LABEL = 22, 20, 150  # pixels; a deep model's cells are made narrower
WIDEST = 1100

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 1150px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td:first-child { white-space: nowrap }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #0072B2; height: 1em; display: inline-block; vertical-align: middle }
.bar.rest { background: #B9C6D2 }
p.note { color: #555; max-width: 70em } svg text { font: 12px system-ui, sans-serif; fill: #222 }
div.map { overflow-x: auto }
"""

Cell = tuple[float, str]  # what decides the color, and what the mouse says


def report_page(report: Report, uses: Iterable[CodebookUse] = ()) -> str:
    """The page.

    Args:
        report: What to show.
        uses: How often the centroids of its layers are used; nothing leaves that part out.
    """
    losses = {layer.name: (layer.loss, f"{layer.loss:.3%}") for layer in report.layers if is_drawable(layer.loss)}
    kinds = list(dict.fromkeys(_place(layer.name)[1] for layer in report.layers))
    bits = {layer.name: (layer.bits_per_weight, f"{layer.bits_per_weight:.3f} bits") for layer in report.layers}
    title = f"{report.model}, {report.bits_per_weight:.2f} bits per weight"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _table((what, escape(value)) for what, value in _facts(report).items()),
        _warnings(report),
        "<h2>Size before and after</h2>" + _sizes(report),
        "<h2>Loss by layer</h2>" + _map(losses, kinds, "{:.2%}".format, is_log=True),
        "<p class=note>Proxy loss tr(E H E<sup>T</sup>) / tr(W H W<sup>T</sup>) on the calibration text: the energy of "
        "the error in a layer's output over that of its weights. 0% is no error.</p>",
        "<h2>Loss by stage</h2>" + _stages(report),
        "<h2>Bits by layer</h2>" + _map(bits, kinds, "{:.2f}".format),
        _index_use(uses, kinds),
        "<h2>Time by stage</h2>" + _times(report),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"{head}\n" + "\n".join(filter(None, sections)) + "\n</html>\n"


def _facts(report: Report) -> dict[str, str]:
    done = report.finetuning
    worst = max((layer for layer in report.layers if is_drawable(layer.loss)), key=lambda x: x.loss, default=None)
    return {
        **({"budget": report.budget, "specs": report.spec} if report.budget else {"spec": report.spec}),
        **({"output head": report.lm_head} if report.lm_head else {}),
        "bits per weight": f"{report.bits_per_weight:.3f}, codebooks and scales included",
        "mean proxy loss": f"{report.mean_loss:.3%}" if report.layers else "no layer",
        **({} if worst is None else {"largest": f"{worst.loss:.3%}, {worst.name}"}),
        **({"KL to the original": f"{done['before']:.4f}, finetuned {done['after']:.4f}"} if done else {}),
        "calibration": report.calibration,
        "seed": str(report.seed),
        "peak memory": f"{report.peak_memory_bytes / 1e9:.2f} GB",
        **({"command": report.command} if report.command else {}),
    }


def _warnings(report: Report) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return f"<h2>Warnings</h2><ul>{items}</ul>" if items else ""


def _sizes(report: Report) -> str:
    """Two bars of the same scale: the quantized layers, and in grey what stays in 16 bits."""
    rest = 2 * (report.total_weights - report.quantized_weights)
    before, after = 2 * report.quantized_weights, report.quantized_weights * report.bits_per_weight / 8
    rows = []
    for what, layers in (("in 16 bits", before), ("quantized", after)):
        bars = _bar(layers / max(before + rest, 1)) + _bar(rest / max(before + rest, 1), "rest")
        rows.append((what, f"{bars} {(layers + rest) / 1e6:,.1f} MB, linear layers {layers / 1e6:,.1f} MB"))
    return _table(rows) + "<p class=note>Blue: the layers that are quantized. Grey: everything else, in 16 bits.</p>"


def _times(report: Report) -> str:
    longest = max(report.stage_seconds.values(), default=0.0)
    rows = [
        (stage, f"{_bar(seconds / longest)} {_duration(seconds)}") for stage, seconds in report.stage_seconds.items()
    ]
    return _table([*rows, ("in all", _duration(report.seconds))])


def _stages(report: Report) -> str:
    """Mean loss of each kind of matrix after each stage."""
    stages = list(report.mean_losses)
    rows = ["<tr><th></th>" + "".join(f"<th class=number>{escape(stage)}</th>" for stage in stages) + "</tr>"]
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault(_place(layer.name)[1], []).append(layer)
    for kind, layers in (*kinds.items(), ("all", report.layers)):
        means = [_mean([layer.losses[stage] for layer in layers if stage in layer.losses]) for stage in stages]
        cells = "".join(f"<td class=number>{'' if mean is None else f'{mean:.3%}'}</td>" for mean in means)
        rows.append(f"<tr><td>{escape(kind)}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _index_use(uses: Iterable[CodebookUse], kinds: Sequence[str]) -> str:
    """A map of each kind of codebook: how much of an index's bits the choice of centroids really takes."""
    maps: dict[str, dict[str, Cell]] = {}
    dead = entries = 0
    for use in uses:
        unused = len(use.dead)
        dead, entries = dead + unused, entries + use.counts.numel()
        told = f"entropy {use.entropy:.2f} of {use.index_bits:g} bits, {unused:,} of {use.counts.numel():,} dead"
        maps.setdefault(use.codebook, {})[use.layer] = use.entropy / max(use.index_bits, 1), told
    if not maps:
        return ""
    drawn = "".join(f"<p>{kind} codebook</p>{_map(cells, kinds, '{:.0%}'.format)}" for kind, cells in maps.items())
    return (
        f"<h2>Use of indices</h2>{drawn}<p class=note>Entropy of an index over its bits: 100% is a codebook whose "
        f"centroids are all used alike. {dead:,} of {entries:,} centroids are used by no vector.</p>"
    )


def _map(cells: Mapping[str, Cell], order: Sequence[str], form: Callable[[float], str], is_log: bool = False) -> str:
    """Layers by block and, in this order, kind; of several in one place (experts) the largest figure is shown."""
    placed: dict[tuple[int, str], tuple[Cell, str]] = {}
    for name, cell in cells.items():
        block, kind = _place(name)
        if (block, kind) not in placed or placed[block, kind][0][0] < cell[0]:
            placed[block, kind] = cell, name
    if not placed:
        return "<p>nothing to show</p>"
    kinds = sorted({kind for _, kind in placed}, key=order.index)
    blocks = max(block for block, _ in placed) + 1
    values = [cell[0] for cell, _ in placed.values()]
    low, high = min(values), max(values)
    low = max(low, high / MOST_TIMES) if is_log else low
    width = min(CELL, (WIDEST - LABEL) / blocks)
    drawn = []
    for (block, kind), ((value, told), name) in placed.items():
        color = _color(_share(value, low, high, is_log))
        x, y = LABEL + block * width, kinds.index(kind) * ROW
        drawn.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{ROW - 1}" fill="{color}">'
            f"<title>{escape(name)}: {escape(told)}</title></rect>"
        )
    drawn += [
        f'<text x="{LABEL - 8}" y="{row * ROW + 14}" text-anchor="end">{escape(kind)}</text>'
        for row, kind in enumerate(kinds)
    ]
    bottom = len(kinds) * ROW + 14
    step = max(1, math.ceil(30 / width))
    drawn += [
        f'<text x="{LABEL + (block + 0.5) * width:.1f}" y="{bottom}" text-anchor="middle">{block}</text>'
        for block in range(0, blocks, step)
    ]
    drawn += _scale(
        [("≤ " if min(values) < low else "") + form(low), form(high)] if low < high else [form(low)], bottom + 16
    )
    size = f'width="{LABEL + blocks * width + 10:.0f}" height="{bottom + 36}"'
    return f'<div class=map><svg {size} role="img">{"".join(drawn)}</svg></div>'


def _scale(ends: Sequence[str], y: int) -> list[str]:
    """What the colors mean, from the smallest figure to the largest."""
    if len(ends) == 1:
        return [f'<text x="{LABEL}" y="{y + 11}">all {ends[0]}</text>']
    steps = [
        f'<rect x="{LABEL + 60 + 8 * i}" y="{y}" width="8" height="12" fill="{_color(i / 9)}"/>' for i in range(10)
    ]
    return [
        f'<text x="{LABEL + 52}" y="{y + 11}" text-anchor="end">{ends[0]}</text>',
        *steps,
        f'<text x="{LABEL + 148}" y="{y + 11}">{ends[1]}</text>',
    ]


def _place(name: str) -> tuple[int, str]:
    """Decoder block and kind of a layer: the first number in its path (0 for a head), and the last part of it."""
    number = re.search(r"(?<![^.])\d+(?![^.])", name)
    return int(number[0]) if number else 0, name.rpartition(".")[2]


def _share(value: float, low: float, high: float, is_log: bool) -> float:
    if low >= high:
        return 0.5
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return max(0.0, (value - low) / (high - low))


def _color(share: float) -> str:
    return "#" + "".join(
        f"{round(light + share * (dark - light)):02x}" for light, dark in zip(LIGHT, DARK, strict=True)
    )


def _bar(share: float, kind: str = "") -> str:
    return f'<span class="bar {kind}" style="width:{500 * share:.0f}px"></span>'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><td>{escape(what)}</td><td>{value}</td></tr>" for what, value in rows) + "</table>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
