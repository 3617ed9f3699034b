"""`vptq quantize MODEL -o DIR`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vptq.cli.console import facts, file_size, output
from vptq.cli.options import (
    AbsorbPermOption,
    BitsOption,
    CalibrationOption,
    DeviceOption,
    HeadOption,
    MoveIndicesOption,
    NormOption,
    OriginalArgument,
    OverwriteOption,
    PermOption,
    RayOption,
    ResumeOption,
    RotateOption,
    SeedOption,
    SeqlenOption,
    SequencesOption,
    SizeOption,
    StoredDtypeOption,
    WorkersOption,
    check_start,
)
from vptq.cli.progress import Form, ProgressOption, QuietOption, working

if TYPE_CHECKING:
    from vptq.quantize.report import Report
    from vptq.spec import QuantSpec

DEFAULT_BITS = 3.0


class Hessian(str, Enum):
    """What errors of a layer's output count."""

    plain = "plain"
    rows = "rows"
    fisher = "fisher"


class Finetune(str, Enum):
    """What is trained after quantizing."""

    none = "none"
    block = "block"
    e2e = "e2e"
    both = "both"


class HessianInputs(str, Enum):
    """Which inputs the Hessians are made from."""

    quantized = "quantized"
    original = "original"
    both = "both"


def quantize(
    model: OriginalArgument,
    output_dir: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    spec: Annotated[
        str | None,
        typer.Option(
            "--spec",
            help="What every layer becomes, such as v8-k4096-256: vector length, main and residual codebook.  "
            "[default without a budget: 3 index bits, codebooks suit the layers]",
        ),
    ] = None,
    bits: BitsOption = None,
    size: SizeOption = None,
    calibration: CalibrationOption = "self",
    sequences: SequencesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: StoredDtypeOption = None,
    hessian_dir: Annotated[
        Path | None, typer.Option("--hessian-dir", help="Read Hessians from this folder (QuIP#/VPTQ layout).")
    ] = None,
    hessian_inputs: Annotated[
        HessianInputs,
        typer.Option(
            "--hessian-inputs",
            help="Whose activations the Hessians are made of; both gives the best model, original the quickest run.",
        ),
    ] = HessianInputs.both,
    hessian: Annotated[
        Hessian,
        typer.Option(
            "--hessian",
            help="plain: all errors of a layer's outputs count alike; rows: every output as much as the model's loss "
            "feels it (a backward pass over a few thousand tokens); fisher: outputs and tokens (over all tokens).",
        ),
    ] = Hessian.plain,
    finetune: Annotated[
        Finetune,
        typer.Option(
            "--finetune",
            help="Train codebooks, scales and norms towards the original: each block when it is quantized, the whole "
            "model at the end (e2e), or both.",
        ),
    ] = Finetune.none,
    move_indices: MoveIndicesOption = 0.0,
    rotate: RotateOption = False,
    lm_head: HeadOption = None,
    norm: NormOption = None,
    perm: PermOption = None,
    absorb_perm: AbsorbPermOption = True,
    workers: WorkersOption = None,
    ray: RayOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    progress: ProgressOption = Form.auto,
    quiet: QuietOption = False,
) -> None:
    """Quantize a language model's linear layers."""
    if [spec, bits, size].count(None) < 2:
        raise typer.BadParameter("give one of --spec, --bits and --size, not more", param_hint="--spec")
    check_start(overwrite, resume)
    with working(progress, quiet) as shown:
        import torch

        from vptq.quantize.pipeline import quantize as quantize_model
        from vptq.spec import QuantSpec

        chosen = None if spec is None else QuantSpec.parse(spec)
        if chosen is None and bits is None and size is None:
            chosen = _default_spec(model)
        report = quantize_model(
            model,
            output_dir,
            spec=chosen,
            bits=bits,
            size=size,
            calibration=calibration,
            sequences=sequences,
            seqlen=seqlen,
            seed=seed,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            hessian_dir=hessian_dir,
            hessian_inputs=hessian_inputs.value,
            hessian=hessian.value,
            norm=norm,
            perm=perm,
            overwrite=overwrite,
            resume=resume,
            absorb_perm=absorb_perm,
            finetune=finetune.value,
            move_indices=move_indices,
            rotate=rotate,
            lm_head=lm_head,
            workers=workers,
            ray=ray,
            progress=shown,
        )
        for warning in report.warnings:
            shown.warn(warning)
    _print_summary(report, output_dir)


def _default_spec(model: str) -> QuantSpec:
    """The spec of `DEFAULT_BITS` that suits the size of this model's linear layers."""
    import torch

    from vptq.quantize.original import empty_model
    from vptq.quantize.skeleton import find_blocks, linears_of
    from vptq.source import load_config
    from vptq.spec import spec_for_bits

    _, blocks = find_blocks(empty_model(load_config(model), torch.float32, torch.device("meta")))
    sizes = [linear.weight.numel() for block in blocks for linear in linears_of(block).values()]
    return spec_for_bits(DEFAULT_BITS, sum(sizes) // len(sizes))


def _print_summary(report: Report, folder: Path) -> None:
    share = report.quantized_weights / report.total_weights
    minutes, seconds = divmod(round(report.seconds), 60)
    rows = {
        "written": str(folder),
        **({"budget": report.budget, "specs": report.spec} if report.budget else {"spec": report.spec}),
        **({"output head": report.lm_head} if report.lm_head else {}),
        "bits per weight": f"{report.bits_per_weight:.3f}",
        "quantized": f"{len(report.layers)} layers, {report.quantized_weights:,} weights, {share:.1%} of the model",
        "left as it was": _skipped(report),
        "mean proxy loss": f"{report.mean_loss:.3%}",
        "calibration": report.calibration,
        **({"finetuned": _finetuned(report)} if report.finetuning else {}),
        "time": f"{minutes} min {seconds} s",
        "peak memory": file_size(report.peak_memory_bytes),
    }
    output().print(facts(rows))


def _finetuned(report: Report) -> str:
    done = report.finetuning
    steps = f"{done['after']:.4f} after {done['steps']} steps"
    moved = f"; {done['moved']:,} vectors got other indices" if done["moved"] else ""
    return f"KL to the original on held-out text {done['before']:.4f} before, {steps}{moved}"


def _skipped(report: Report) -> str:
    """Every parameter left alone is in report.json; here, how many for which reason."""
    reasons: dict[str, int] = {}
    for reason in report.skipped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "nothing"
