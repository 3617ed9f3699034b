"""GPU times as tables: measured ones on the terminal, and beside the model's predictions in the docs.

A cell is microseconds and, in brackets, the share of what bounds the layer (`gpu_model.bound`), which the published
figures of the GPU give; a GPU that is not among `gpu_devices.DEVICES` has no share. The docs take what was measured
from benchmarks/results/gpu-*.json, as soon as there is such a file for the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_model
from gpu_devices import DEVICES, H200, Device, Shape
from gpu_model import CONFIGS, SHAPES, TOKENS

RESULTS = Path(__file__).parent / "results"
DENSE = "float16 `linear`"
Lines = dict[str, dict[int, str]]
"""A cell for each number of tokens, by what a line is about."""

AIM_SHAPE = SHAPES[0]
AIMS = {"v8-k256-256": 2.5, "v8-k4096": 2.0, "v6-k4096": 2.0, "v8-k65536": 1.0, "v8-k65536-256": 1.0}
AIMS["v16-k65536-65536"] = 1.0
"""Times float16 at one token, on an H200."""
PREFILL, PREFILL_AIM = 512, 0.8


def render(name: str) -> str:
    """Markdown: of a GPU ("h200", a key of `DEVICES`) all its tables, or how the project's aims fare ("aims").

    Raises:
        KeyError: There is no such GPU.
    """
    return aims() if name == "aims" else of_device(DEVICES[name], result_of(DEVICES[name]))


def result_of(device: Device, folder: Path | None = None) -> dict[str, Any] | None:
    """What benchmarks/gpu.py measured on a GPU; None if nobody has run it there."""
    for path in sorted((folder or RESULTS).glob("gpu-*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        if result["benchmark"] == "gpu" and device.name in result["device"]:
            return result
    return None


def of_device(device: Device, result: dict[str, Any] | None) -> str:
    """A table for each shape, predicted and measured lines side by side."""
    told = "not measured on a GPU" if result is None else f"measured at commit {result['commit'][:7]}"
    parts = [f"{device.name}: {told}."]
    for shape in SHAPES:
        found = measured(result, shape, device) if result else {}
        lines: Lines = {}
        for about, cells in predicted(device, shape).items():
            lines[f"{about}, predicted"] = cells
            if about in found:
                lines[f"{about}, **measured**"] = found.pop(about)
        lines |= {f"{about}, **measured**": cells for about, cells in found.items()}
        head = [f"{shape[0]} x {shape[1]}, tokens:", *map(str, TOKENS)]
        rows = ([about, *(cells.get(count, "-") for count in TOKENS)] for about, cells in lines.items())
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def predicted(device: Device, shape: Shape) -> Lines:
    lines: Lines = {DENSE: {count: f"{gpu_model.fp16(device, shape, count).microseconds:.1f}" for count in TOKENS}}
    for name in CONFIGS:
        times = {count: gpu_model.predict(device, name, shape, count).microseconds for count in TOKENS}
        lines[f"`{name}`"] = {count: cell(time, device, name, shape, count) for count, time in times.items()}
    return lines


def measured(result: dict[str, Any], shape: Shape, device: Device | None) -> Lines:
    """What a result file holds of a shape: PyTorch's `linear`, our configs, and other kernels."""
    lines: Lines = {}
    here = f"{shape[0]}x{shape[1]}"
    for row in result["rows"]:
        if row["shape"] == here:
            count, time = row["tokens"], row["microseconds"][row["served"]]
            lines.setdefault(DENSE, {})[count] = f"{row['fp16_microseconds']:.1f}"
            lines.setdefault(f"`{row['config']}`", {})[count] = cell(time, device, row["config"], shape, count)
    for row in result.get("peers", ()):
        if row["shape"] == here:
            lines.setdefault(row["peer"], {})[row["tokens"]] = f"{row['microseconds']:.1f}"
    return lines


def cell(time: float, device: Device | None, name: str, shape: Shape, tokens: int) -> str:
    share = f" ({gpu_model.bound(device, name, shape, tokens) / time:.2f})" if device else ""
    return f"{time:.1f}{share}"


def aims() -> str:
    """Times float16 on the layer that the aims are about, beside the aims."""
    result = result_of(H200)
    rows = []
    for name in CONFIGS:
        one = gpu_model.predict(H200, name, AIM_SHAPE, 1)
        ratios = [times_fp16(device, name, 1) for device in (H200, replace(H200, lines=4))]
        ratios.append(times_fp16(H200, name, PREFILL))
        found = [measured_times(result, name, count) for count in (1, PREFILL)]
        aim = f"{AIMS[name]:.1f}" if name in AIMS else "-"
        head, last = [f"`{name}`", one.binds, f"{one.fixed:.0f} + {one.busy[one.binds]:.0f}"], f"{ratios[2]:.2f}"
        rows.append([*head, *(f"{ratio:.2f}" for ratio in ratios[:2]), aim, found[0], last, str(PREFILL_AIM), found[1]])
    head = ["config", "what binds", "us: before and after + the rest", "times float16", "at 4 lines a cycle", "aim"]
    return markdown([*head, "measured", f"{PREFILL} tokens: times float16", "aim", "measured"], rows)


def times_fp16(device: Device, name: str, tokens: int) -> float:
    dense = gpu_model.fp16(device, AIM_SHAPE, tokens)
    return dense.microseconds / gpu_model.predict(device, name, AIM_SHAPE, tokens).microseconds


def measured_times(result: dict[str, Any] | None, name: str, tokens: int) -> str:
    for row in result["rows"] if result else ():
        if (row["config"], row["shape"], row["tokens"]) == (name, "x".join(map(str, AIM_SHAPE)), tokens):
            return f"{row['times_fp16']:.2f}"
    return "-"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(result: dict[str, Any]) -> None:
    """Prints a table for each shape that was measured; in Markdown on a bare machine, which has no rich."""
    device = next((known for known in DEVICES.values() if known.name in result["device"]), None)
    for shape in SHAPES:
        lines = measured(result, shape, device)
        counts = sorted({count for cells in lines.values() for count in cells})
        head = ["tokens", *map(str, counts)]
        rows = [
            [about.replace("`", ""), *(cells.get(count, "-") for count in counts)] for about, cells in lines.items()
        ]
        title = f"{shape[0]} x {shape[1]} on {result['device']}: microseconds (share of the bound)"
        if lines and find_spec("rich"):
            show_rich(title, head, rows)
        elif lines:
            print(f"{title}\n{markdown(head, rows)}")


def show_rich(title: str, head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
