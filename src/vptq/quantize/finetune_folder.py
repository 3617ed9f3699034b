"""Finetuning a quantized folder that is there already, whoever made it: `vptq finetune DIR MODEL -o OUT`.

Most published VPTQ models were never finetuned. Size and format stay as they are; what is written is the folder again
with other codebooks, scales and norms, and other indices if that is asked for (`finetune.py`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.checkpoint import Checkpoint, save_tensors, staged_folder, write_json
from vptq.errors import ConfigError
from vptq.index_use import codebook_uses
from vptq.linear import VQuantLinear
from vptq.packing import change_carrier
from vptq.progress import ProgressCallback, ProgressEvent, ignore
from vptq.quantize.calibration import load_calibration
from vptq.quantize.card import save_card
from vptq.quantize.finetune import FinetuneReport, Finetuning, held_out_for
from vptq.quantize.original import Original, compute_dtype
from vptq.quantize.recipe import finetune_command, text_options
from vptq.quantize.report import load_report, save_report
from vptq.quantize.setup import check_output, check_share, check_text_size, checked_calibration, checked_device
from vptq.quantize.skeleton import Skeleton, head_of
from vptq.quantize.training import TrainingConfig
from vptq.quantize.weights import WeightFiles
from vptq.quantize.workspace import Workspace
from vptq.source import load_config, load_tokenizer, resolve_model
from vptq.transformers_versions import tied_weights

REPORT_NAME = "finetune.json"


def finetune(
    folder: str | Path,
    original: str | Path,
    output_dir: str | Path,
    *,
    calibration: str | Path = "self",
    sequences: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    move_indices: float = 0.0,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> FinetuneReport:
    """Trains a quantized model's codebooks, scales and norms towards its original's predictions.

    Args:
        folder: the quantized model.
        original: hub id, local folder or GGUF file of the model it was made from.
        output_dir: must not exist, unless `overwrite` or `resume`.
        calibration: as for `vptq.quantize`.
        sequences: to train on; a sixteenth more only judges.
        seqlen: tokens a sequence.
        seed: of the sampled text and of the order of sequences.
        device: "auto" (CUDA when there is one), "cpu", "cuda:1", ...
        move_indices: share of all vectors that may get other indices on the way, such as 0.01; 0 for none.
        overwrite: replace an output folder that exists.
        resume: go on with an interrupted run.
        progress: told about every step.

    Returns:
        What training did; it is stored in finetune.json, and in report.json where the folder has one.

    Raises:
        VPTQError: one of its kinds, with one line that says what to do.
    """
    folder, output, tell = Path(folder), Path(output_dir), progress or ignore
    check_output(output, overwrite=overwrite, resume=resume)
    check_text_size(sequences, seqlen)
    check_share(move_indices)
    text, place, workspace = checked_calibration(str(calibration)), checked_device(device), Workspace(output)
    stored = _stored_dtype(folder)
    source = resolve_model(original)
    config = load_config(source)
    if getattr(config, "quantization_config", None) and source.gguf_file is None:
        raise ConfigError(f"{source} is quantized itself; give the model that {folder} was made from")
    teacher = Original(source, None, config, place, compute_dtype(place, stored), workspace.folder / "original")
    training, held_out = TrainingConfig(), held_out_for(sequences)
    settings = {
        **{"folder": str(folder.resolve()), "model": str(source), "calibration": text, "sequences": sequences},
        **{"seqlen": seqlen, "seed": seed, "device": place.type, "training": dataclasses.asdict(training)},
        "move_indices": move_indices,
    }
    workspace.open(settings, overwrite=overwrite, resume=resume)

    def make() -> tuple[Tensor, dict[str, Any]]:
        wanted = sequences + held_out
        made = load_calibration(text, load_tokenizer(source), wanted, seqlen, seed, teacher.whole_model, tell)
        return made.tokens, {"description": made.description}

    try:
        skeleton = teacher.open_skeleton(tell)
        _check_same_head(folder, skeleton)
        tokens, _ = workspace.tokens(make)
        run = Finetuning(
            folder, skeleton, tokens, min(held_out, len(tokens) // 2), workspace.folder, stored, place, seed, training,
            tell, move_indices,
        )  # fmt: skip
        done, trained = run.run()
    except ConfigError:
        if not workspace.resumed:
            workspace.remove()  # the same input would fail again
        raise
    tell(ProgressEvent("writing the folder"))
    command = finetune_command(source, text_options(text, sequences, seqlen, seed), move_indices)
    _write(folder, output, trained, done, command, base_model=teacher.base_model, overwrite=overwrite)
    workspace.remove()
    return done


def _stored_dtype(folder: Path) -> torch.dtype:
    """The float dtype of the quantized layers of a folder, which is checked on the way.

    Raises:
        CheckpointError: it is no quantized model, or damaged.
    """
    stored = Checkpoint.open(folder)
    path = next(iter(stored.layers()))
    return stored.headers[f"{path}.centroids.weight"].dtype


def _check_same_head(folder: Path, original: Skeleton) -> None:
    """Raises ConfigError where the folder was made from another model, as far as the output head can tell.

    A dense head serves both models, so it has to be the original's; of a quantized one each goes through its own.
    """
    path, _ = head_of(original.model)
    name, files = tied_weights(original.model).get(f"{path}.weight", f"{path}.weight"), WeightFiles(folder)
    stored = Checkpoint.open(folder)
    quantized = path in stored.layers()
    if not (quantized or name in files) or name not in original.files:
        raise ConfigError(f"{folder} does not hold the output head of its original ({name}): it cannot be finetuned")
    theirs = original.files.load(name)
    if quantized:
        ours = VQuantLinear.from_weight(stored.load_layer(path), torch.float32).dequantize()
        same = ours.shape == theirs.shape and bool((ours - theirs).norm() < theirs.float().norm())
    else:
        ours = files.load(name)
        same = ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype))
    if not same:
        raise ConfigError(
            f"{name} of {folder} is not that of the original: give the model it was made from; one made with --rotate "
            "or with a finetuned head cannot be finetuned this way"
        )


def _write(
    folder: Path,
    output: Path,
    trained: Mapping[str, Tensor],
    done: FinetuneReport,
    command: str,
    *,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """The folder again with the trained tensors in place of its own, and reports that say so."""
    files = WeightFiles(folder)
    with staged_folder(output, overwrite) as staging:
        save_tensors(staging, ((name, _replaced(files.load(name), trained.get(name))) for name in files))
        for path in folder.iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                shutil.copy2(path, staging)
        write_json(staging / REPORT_NAME, dataclasses.asdict(done))
        report = load_report(folder)
        if report is not None:
            report.finetuning = dataclasses.asdict(done)
            report.command = "\n".join(filter(None, (report.command, command)))
            save_report(report, staging, codebook_uses(Checkpoint.open(staging)))
            save_card(report, staging, base_model)


def _replaced(stored: Tensor, trained: Tensor | None) -> Tensor:
    """A trained tensor the way the stored one is; indices keep the carrier they came in."""
    if trained is None:
        return stored
    return trained.to(stored) if trained.is_floating_point() else change_carrier(trained, stored.dtype)
