"""Every setting of a quantization run, checked before the hours are spent."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vptq.errors import ConfigError
from vptq.quantize.budget import Budget
from vptq.quantize.calibration import SELF, split_sources
from vptq.quantize.job import Job
from vptq.quantize.original import Original, compute_dtype
from vptq.quantize.solver import SolverConfig
from vptq.quantize.training import TrainingConfig
from vptq.quantize.workers import Processes, Workers, worker_devices
from vptq.quantize.workspace import Workspace
from vptq.source import load_config, resolve_model
from vptq.spec import QuantSpec

DEFAULT_SPEC = "v8-k65536-256"
STORED_DTYPES = (torch.float16, torch.bfloat16)
HESSIAN_INPUTS = ("quantized", "original", "both")
HESSIANS = ("plain", "rows", "fisher")
FINETUNE = ("none", "block", "e2e", "both")


def prepare(
    model: str | Path | nn.Module,
    output: Path,
    spec: str | QuantSpec | None,
    *,
    calibration: str = SELF,
    sequences: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    hessian_dir: Path | None = None,
    hessian_inputs: str = "both",
    hessian: str = "plain",
    norm: bool | None = None,
    perm: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    absorb_perm: bool = True,
    finetune: str = "none",
    move_indices: float = 0.0,
    rotate: bool = False,
    budget: Budget | None = None,
    lm_head: str | QuantSpec | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> Job:
    """Checks everything that can be checked without reading weights. With neither spec nor budget, DEFAULT_SPEC it is.

    Raises:
        ConfigError: which setting is wrong, what it was, and what is allowed.
    """
    if spec is not None and budget is not None:
        raise ConfigError(
            f"--spec names what every layer gets, and {budget} is a budget to choose from; give one of them"
        )
    spec = DEFAULT_SPEC if spec is None else spec
    chosen = _chosen(spec, norm, perm)
    if lm_head is not None and hessian_dir is not None:
        raise ConfigError(f"--lm-head {lm_head}: Hessian files have none for the head; leave --hessian-dir out")
    if lm_head is not None and (lm_head == "auto") != (budget is not None):
        how = "give a spec, such as v8-k256-256" if budget is None else "give auto"
        raise ConfigError(f"--lm-head is {lm_head}, with {budget or 'no budget to choose for'}; {how}")
    head = lm_head if lm_head is None or lm_head == "auto" else _chosen(lm_head, norm, perm)
    if hessian_inputs not in HESSIAN_INPUTS:
        raise ConfigError(f"--hessian-inputs is {hessian_inputs!r}; choose one of {', '.join(HESSIAN_INPUTS)}")
    if hessian not in HESSIANS:
        raise ConfigError(f"--hessian is {hessian!r}; choose one of {', '.join(HESSIANS)}")
    if hessian != "plain" and hessian_dir is not None:
        raise ConfigError(f"--hessian {hessian} takes calibration text; --hessian-dir does without any")
    if finetune not in FINETUNE:
        raise ConfigError(f"--finetune is {finetune!r}; choose one of {', '.join(FINETUNE)}")
    if finetune in ("block", "both") and (hessian_dir is not None or hessian_inputs == "original"):
        raise ConfigError(
            f"--finetune {finetune} trains on what the quantized model computes, which "
            f"{'--hessian-dir' if hessian_dir is not None else '--hessian-inputs original'} does without; "
            "choose --finetune e2e, or --hessian-inputs both or quantized"
        )
    check_share(move_indices)
    if move_indices and finetune not in ("e2e", "both"):
        raise ConfigError(
            f"--move-indices is {move_indices:g}, and indices move while the whole model is trained; add --finetune "
            "e2e or --finetune both"
        )
    check_text_size(sequences, seqlen)
    if dtype is not None and dtype not in STORED_DTYPES:
        raise ConfigError(f"--dtype is {dtype}; a checkpoint is stored in float16 or bfloat16")
    if hessian_dir is not None and not hessian_dir.is_dir():
        raise ConfigError(f"--hessian-dir: there is no folder {hessian_dir}")
    if hessian_dir is not None and rotate:
        raise ConfigError(
            f"--rotate with --hessian-dir {hessian_dir}: those Hessians belong to the model without rotations; leave"
            " one of the two out"
        )
    check_output(output, overwrite=overwrite, resume=resume)
    memory_model = model if isinstance(model, nn.Module) else None
    source = None if isinstance(model, nn.Module) else resolve_model(model)
    config = memory_model.config if memory_model is not None else load_config(source)  # type: ignore[arg-type]
    if getattr(config, "quantization_config", None) and not (source and source.gguf_file):
        raise ConfigError(f"{source or 'the model'} is quantized already; start from the original weights")
    stored, place, workspace = dtype or _stored_dtype(config), checked_device(device), Workspace(output)
    return Job(
        original=Original(
            source, memory_model, config, place, compute_dtype(place, stored), workspace.folder / "original"
        ),
        output=output,
        spec=chosen,
        calibration=checked_calibration(calibration),
        sequences=sequences,
        seqlen=seqlen,
        seed=seed,
        device=place,
        dtype=stored,
        hessian_dir=hessian_dir,
        hessian_inputs=hessian_inputs,
        hessian=hessian,
        overwrite=overwrite,
        resume=resume,
        absorb_perm=absorb_perm,
        finetune=finetune,
        move_indices=move_indices,
        rotate=rotate,
        solver=SolverConfig(),
        training=TrainingConfig(),
        workspace=workspace,
        workers=_workers(place, workers, ray),
        budget=budget,
        lm_head=head,
    )


def _workers(device: torch.device, workers: int | None, ray: str | None) -> Workers:
    """Where layers are solved; Ray's part is loaded only here."""
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}; at least 1 is needed")
    if ray is not None:
        from vptq.quantize.cluster import Cluster

        return Cluster(ray, device, workers)
    devices = worker_devices(device, workers or 1)
    return Processes(devices) if len(devices) > 1 else Workers()


def _chosen(spec: str | QuantSpec, norm: bool | None, perm: bool | None) -> QuantSpec:
    """The spec that is meant, with another norm and perm where they are given."""
    chosen = QuantSpec.parse(spec) if isinstance(spec, str) else spec
    if norm is not None:
        chosen = dataclasses.replace(chosen, enable_norm=norm)
    return chosen if perm is None else dataclasses.replace(chosen, enable_perm=perm)


def check_output(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Raises ConfigError where a run would have to replace a folder, or resume a finished one."""
    if output.exists() and not overwrite and not resume:
        raise ConfigError(f"{output} exists; choose another folder, or give --overwrite or --resume")
    if output.exists() and resume:
        raise ConfigError(f"{output} is finished; there is nothing to resume")


def check_share(move_indices: float) -> None:
    """Raises ConfigError where --move-indices is no share."""
    if not 0.0 <= move_indices <= 1.0:
        raise ConfigError(
            f"--move-indices is {move_indices:g}, a share of all vectors; choose 0 (none) to 1, such as 0.01"
        )


def check_text_size(sequences: int, seqlen: int) -> None:
    """Raises ConfigError where there would be no text, or none to predict."""
    if sequences < 1 or seqlen < 2:
        raise ConfigError(f"--sequences is {sequences} and --seqlen {seqlen}; at least 1 and 2 are needed")


def checked_calibration(calibration: str) -> str:
    """The calibration texts, files by their whole paths; ConfigError where a file is meant and missing."""
    return ",".join(_checked_text(source) for source in split_sources(calibration))


def _checked_text(source: str) -> str:
    if Path(source).is_file():
        return str(Path(source).resolve())
    if not source:
        raise ConfigError("--calibration names an empty text; separate texts by single commas, such as wikitext2,self")
    if source != SELF and (Path(source).suffix == ".txt" or source.startswith(("/", "."))):
        raise ConfigError(f"--calibration: there is no file {source}")
    return source


def checked_device(device: str | torch.device) -> torch.device:
    """The device that is meant; ConfigError where this machine lacks it."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device is {device}, which this machine does not have ({str(error).splitlines()[0]})"
        ) from error
    return chosen


def _stored_dtype(config: Any) -> torch.dtype:
    """The original's dtype where it is a 16-bit one; float32 originals lose no range in bfloat16."""
    own = getattr(config, "dtype", None)
    return own if own in STORED_DTYPES else torch.bfloat16
