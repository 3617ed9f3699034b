"""`vptq finetune DIR MODEL -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vptq.cli.console import facts, output
from vptq.cli.options import (
    CalibrationOption,
    DeviceOption,
    MoveIndicesOption,
    OriginalArgument,
    OverwriteOption,
    ResumeOption,
    SeedOption,
    SeqlenOption,
    SequencesOption,
    check_start,
)
from vptq.cli.progress import Form, ProgressOption, QuietOption, working


def finetune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized folder, whoever made it.")],
    model: OriginalArgument,
    output_dir: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.")],
    calibration: CalibrationOption = "self",
    sequences: SequencesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    move_indices: MoveIndicesOption = 0.0,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    progress: ProgressOption = Form.auto,
    quiet: QuietOption = False,
) -> None:
    """Train a folder's codebooks and norms towards its original.

    Scales are trained too; size stays, and so do indices unless --move-indices says otherwise.
    What does not bring the model nearer on text that was held out is thrown away.
    """
    check_start(overwrite, resume)
    with working(progress, quiet) as shown:
        from vptq.quantize.finetune_folder import finetune as finetune_folder

        done = finetune_folder(
            folder,
            model,
            output_dir,
            calibration=calibration,
            sequences=sequences,
            seqlen=seqlen,
            seed=seed,
            device=device,
            move_indices=move_indices,
            overwrite=overwrite,
            resume=resume,
            progress=shown,
        )
    minutes, seconds = divmod(round(done.seconds), 60)
    falls = f"{done.before:.4f} before, {done.after:.4f} after"
    rows = {
        "written": str(output_dir),
        "KL to the original": f"{falls}, on {done.held_out} held-out sequences",
        "trained": f"{done.trained:,} numbers, {done.steps} steps",
        **({"other indices": f"{done.moved:,} vectors"} if move_indices else {}),
        "time": f"{minutes} min {seconds} s",
    }
    output().print(facts(rows))
