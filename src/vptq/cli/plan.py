"""`vptq plan MODEL --bits 2.25`: what a budget buys, before any hour is spent."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vptq.cli.console import (
    check_json_file,
    facts,
    file_size,
    output,
    plain_table,
    write_json_file,
)
from vptq.cli.options import (
    AbsorbPermOption,
    BitsOption,
    CalibrationOption,
    DeviceOption,
    HeadOption,
    NormOption,
    OriginalArgument,
    PermOption,
    RotateOption,
    SeedOption,
    SeqlenOption,
    SequencesOption,
    SizeOption,
    StoredDtypeOption,
)
from vptq.cli.progress import Form, ProgressOption, QuietOption, working

if TYPE_CHECKING:
    from vptq.quantize.plan import Plan, PlannedLayer


def plan(
    model: OriginalArgument,
    bits: BitsOption = None,
    size: SizeOption = None,
    calibration: CalibrationOption = "self",
    sequences: SequencesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: StoredDtypeOption = None,
    norm: NormOption = None,
    perm: PermOption = None,
    absorb_perm: AbsorbPermOption = True,
    rotate: RotateOption = False,
    lm_head: HeadOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file as well.")] = None,
    progress: ProgressOption = Form.auto,
    quiet: QuietOption = False,
) -> None:
    """Show which layers a budget would quantize how.

    The same options make `vptq quantize` follow this plan; the measurement is kept, so that it is made once.
    """
    if (bits is None) == (size is None):
        raise typer.BadParameter("give one of --bits and --size", param_hint="--bits")
    check_json_file(json_file)
    with working(progress, quiet) as shown:
        import torch

        from vptq.quantize.planner import plan as plan_model

        made = plan_model(
            model,
            bits=bits,
            size=size,
            calibration=calibration,
            sequences=sequences,
            seqlen=seqlen,
            seed=seed,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            norm=norm,
            perm=perm,
            absorb_perm=absorb_perm,
            rotate=rotate,
            lm_head=lm_head,
            progress=shown,
        )
    _print_plan(made)
    if json_file is not None:
        write_json_file(made.to_dict(), json_file)


def _print_plan(plan: Plan) -> None:
    console = output()
    rows = {
        "budget": plan.budget,
        "bits per weight": f"{plan.bits_per_weight:.4f}",
        "weight files": f"{file_size(plan.file_bytes)} at most",
        "expected KL": f"{plan.divergence:.4f} nats per token, if the damage of single layers adds up",
    }
    console.print(facts(rows))
    for title, key in (("layers", _kind), ("spec", lambda layer: layer.spec)):
        console.print()
        console.print(_table(title, plan.layers, key))


def _table(title: str, layers: Sequence[PlannedLayer], key: Callable[[PlannedLayer], str]) -> Table:
    groups: dict[str, list[PlannedLayer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    table = plain_table(title, "count", "least", "mean bits", "most", "size", "expected KL")
    for name, some in groups.items():
        widths = [layer.bits / layer.weights for layer in some]
        stored = sum(layer.bits for layer in some)
        mean = stored / sum(layer.weights for layer in some)
        cells = [f"{width:.3f}" for width in (min(widths), mean, max(widths))]
        table.add_row(name, str(len(some)), *cells, file_size(stored / 8), f"{sum(x.divergence for x in some):.4f}")
    return table


def _kind(layer: PlannedLayer) -> str:
    """What the same matrix is called in every block: its path inside it, experts as one."""
    inside = re.sub(r"^.*?\.\d+\.", "", layer.name)
    return re.sub(r"\.\d+(?=\.)", ".*", inside)
